"""The grammars of talk: cities, sums, small talk, repeating, JSON. Each function draws one Round in one language."""

# ruff: noqa: E501  (Chinese counts double; the tables read best as they are)

import json
from random import Random

from dialogue import SEPARATOR, Round, slot
from words import (
    CITIES,
    COLOURS,
    DAYS,
    EVENTS,
    GOODS,
    JOBS,
    PLACES,
    City,
    coined,
    invented,
    person,
    place,
)  # fmt: skip

# ---- cities -----------------------------------------------------------------------------------------------------

CROWD = {
    "en": {
        10: "more than ten million",
        5: "more than five million",
        1: "more than one million",
        0: "fewer than one million",
    },
    "zh": {10: "一千万以上", 5: "五百万以上", 1: "一百万以上", 0: "不到一百万"},
}
INTRODUCE = {
    "zh": ["请介绍一下{city}", "介绍一下{city}", "请介绍一下{city}。", "说说{city}吧", "给我讲讲{city}",
           "{city}是个什么样的城市？",
           "我想了解{city}", "能介绍一下{city}吗？", "请简单介绍{city}。", "{city}怎么样？"],
    "en": ["Tell me about {city}.", "Please introduce {city}.", "What can you tell me about {city}?",
           "Introduce {city}",
           "I would like to know more about {city}.", "Describe {city}.", "What is {city} like?",
           "Tell me about {city}",
           "Give me a short introduction to {city}.", "Can you introduce {city}?"],
}  # fmt: skip
FACTS = {
    "country": {
        "en": (["Which country is {city} in?", "What country is {city} in?", "Where is {city}?",
                "In which country is {city}?",
                "Which country does {city} belong to?", "Name the country of {city}.", "{city} is in which country?",
                "Where can I find {city}?"], "{city} is in {country}."),
        "zh": (["{city}在哪个国家？", "{city}是哪个国家的城市？", "{city}属于哪个国家？", "{city}在哪里？",
                "{city}在哪儿？",
                "哪个国家有{city}？", "{city}位于哪个国家？", "说出{city}所在的国家。"], "{city}在{country}。"),
    },
    "water": {
        "en": (["Which water does {city} lie on?", "What river, lake or sea is {city} on?",
                "{city} lies on which water?",
                "Name the water at {city}.", "What water is near {city}?", "Which water is {city} on?",
                "What water would I see in {city}?", "Which river or sea is by {city}?"], "{city} lies on {water}."),
        "zh": (["{city}靠着什么水域？", "{city}在哪条河或哪片海边？", "{city}临近什么水？", "{city}旁边是什么河或海？",
                "{city}附近有什么水域？", "{city}傍着哪片水？", "在{city}能看到什么水？", "{city}挨着哪条江河湖海？"],
               "{city}在{water}边上。"),
    },
    "sight": {
        "en": (["What is the famous sight of {city}?", "What should I see in {city}?", "Name a sight in {city}.",
                "Which landmark does {city} have?", "What is worth a visit in {city}?", "What can I visit in {city}?",
                "Which sight is {city} famous for?", "What landmark is in {city}?"],
                "In {city} you should see {sight}."),
        "zh": (["{city}有什么著名景点？", "{city}的名胜是什么？", "去{city}应该看什么？", "{city}有什么好玩的地方？",
                "{city}的地标是什么？", "说一个{city}的景点。", "{city}哪里值得参观？", "到{city}参观什么？"],
               "在{city}应该去看{sight}。"),
    },
    "fame": {
        "en": (["What is {city} known for?", "What is {city} famous for?", "Why is {city} well known?",
                "What made {city} famous?",
                "Name something typical of {city}.", "What is typical of {city}?", "For what do people know {city}?",
                "{city} is known for what?"], "{city} is known for {fame}."),
        "zh": (["{city}以什么闻名？", "{city}因什么出名？", "{city}有什么特色？", "{city}最有名的是什么？",
                "{city}的特产是什么？",
                "人们为什么知道{city}？", "说说{city}的特色。", "{city}出名在哪里？"], "{city}以{fame}闻名。"),
    },
    "crowd": {
        "en": (["How many people live in {city}?", "How large is {city}?", "What is the population of {city}?",
                "How big is {city}?",
                "How many inhabitants has {city}?", "Tell me the population of {city}.", "Is {city} a large city?",
                "How populous is {city}?"], "{city} has {crowd} people."),
        "zh": (["{city}有多少人？", "{city}的人口是多少？", "{city}人口有多少？", "{city}有多大？",
                "多少人住在{city}？",
                "{city}是大城市吗？", "告诉我{city}的人口。", "{city}住着多少人？"], "{city}有{crowd}人口。"),
    },
    "where": {
        "en": (["Where is {sight}?", "In which city is {sight}?", "Which city has {sight}?", "What city is {sight} in?",
                "Which city do I visit to see {sight}?", "Where can I see {sight}?", "Name the city of {sight}.",
                "{sight} is in which city?"], "You can see {sight} in {city}."),
        "zh": (["{sight}在哪座城市？", "{sight}在哪里？", "哪座城市有{sight}？", "想看{sight}要去哪座城市？",
                "{sight}位于哪座城市？",
                "去哪里看{sight}？", "说出{sight}所在的城市。", "{sight}是哪座城市的景点？"], "{sight}在{city}。"),
    },
    "capital": {
        "en": (["What is the capital of {country}?", "Which city is the capital of {country}?",
                "Name the capital of {country}.",
                "Tell me the capital of {country}.", "{country} has which capital?",
                "Do you know the capital of {country}?",
                "What city is the capital of {country}?", "Capital of {country}?"],
                "The capital of {country} is {city}."),
        "zh": (["{country}的首都是哪里？", "{country}的首都是什么？", "哪座城市是{country}的首都？",
                "{country}首都在哪？",
                "说出{country}的首都。", "你知道{country}的首都吗？", "{country}的首都叫什么？",
                "{country}的首都是哪座城市？"],
               "{country}的首都是{city}。"),
    },
}  # fmt: skip
ANSWER = {"country": "country", "water": "water", "sight": "sight", "fame": "fame", "crowd": "crowd", "where": "city",
          "capital": "city"}  # fmt: skip


def facts_of(city: City, lang: str) -> dict[str, str]:
    return {
        "city": city.name[lang], "country": city.country[lang], "water": city.water[lang], "sight": city.sight[lang],
        "fame": city.fame[lang], "crowd": CROWD[lang][city.millions],
    }  # fmt: skip


def paragraph(city: City, lang: str) -> str:
    """The one text about a city. Beijing's is longer: it is the first that most people ask for."""
    facts = facts_of(city, lang)
    style = sum(city.name["en"].encode()) % 3
    if lang == "zh":
        role = "{country}的首都" if city.capital else "{country}的一座城市"
        text = [
            f"{{city}}是{role}，在{{water}}边上，有{{crowd}}人口。最著名的景点是{{sight}}，当地以{{fame}}闻名，值得慢慢游览。",
            f"{{city}}是{role}，人口{{crowd}}，坐落在{{water}}边上。来到这里，应该去看{{sight}}；这座城市还以{{fame}}闻名。",
            f"{{city}}在{{water}}边上，是{role}，有{{crowd}}人口。这里有著名的{{sight}}，也以{{fame}}闻名，欢迎你来走一走。",
        ][style]
        if city.name["en"] == "Beijing":
            text += "北京有三千多年的建城史，是全国的政治和文化中心。长城从北面的群山上经过，城里的胡同和四合院保留着老北京的生活。"
    else:
        role = "the capital of {country}" if city.capital else "a city in {country}"
        text = [
            f"{{city}} is {role}. It lies on {{water}} and has {{crowd}} people. Its most famous sight is {{sight}}, and the "
            "city is known for {fame}. It is worth a long visit.",
            f"{{city}} is {role} with {{crowd}} people, and lies on {{water}}. Visitors should see {{sight}}. The city is also "
            "known for {fame}.",
            f"{{city}} lies on {{water}}. It is {role} and has {{crowd}} people. Here you should see {{sight}}. The city is "
            "known for {fame}, and visitors are welcome.",
        ][style]
        if city.name["en"] == "Beijing":
            text += (
                " Beijing is more than three thousand years old, and the centre of politics and culture of the country. The "
                "Great Wall runs over the mountains to the north, and the old lanes keep the life of the past."
            )
    return slot(text, **facts)


def introduction(rng: Random, lang: str, city: City | None = None, wording: int | None = None) -> Round:
    """A paragraph about a city of the table; now and then about one that is not in it."""
    template = INTRODUCE[lang][rng.randrange(10) if wording is None else wording]
    if city is None and rng.random() < 0.12:
        name = invented(rng, lang) if rng.random() < 0.6 else rng.choice(PLACES[lang])
        reply = {"en": "I am sorry, I do not know {city}. I only know about a hundred cities.",
                 "zh": "抱歉，我不了解{city}。我只认识一百多座城市。"}[lang]  # fmt: skip
        ask = slot(template, city=name)
        return Round("unknown city", ask, ask, slot(reply, city=name), _about(lang, name), answers=[name])
    city = city or rng.choice(CITIES)
    facts, ask = facts_of(city, lang), slot(template, city=city.name[lang])
    answers = [facts[k] for k in ("country", "water", "sight", "fame", "crowd")]
    return Round("introduction", ask, ask, paragraph(city, lang), _about(lang, city.name[lang]), answers=answers)


def fact(rng: Random, lang: str) -> Round:
    """One question about one city."""
    kind, city = rng.choice(list(FACTS)), rng.choice(CITIES)
    if kind == "capital":
        city = rng.choice([c for c in CITIES if c.capital])
    asks, reply = FACTS[kind][lang]
    facts = facts_of(city, lang)
    ask = slot(rng.choice(asks), **facts)
    polite = rng.choice(
        {"en": ["", "", "", "Please tell me: ", "A question: "], "zh": ["", "", "", "请问", "问一下，"]}[lang]
    )
    about = facts["sight"] if kind == "where" else facts["country"] if kind == "capital" else facts["city"]
    return Round("fact", ask, polite + ask, slot(reply, **facts), _about(lang, about), answers=[facts[ANSWER[kind]]])


def _about(lang: str, name: str) -> str:
    return slot({"en": "The user asks about {name}.", "zh": "用户在问{name}。"}[lang], name=name)


# ---- sums -------------------------------------------------------------------------------------------------------

SUMS = {
    "en": {"+": ["{a}+{b}=?", "What is {a} + {b}?", "Add {a} and {b}.", "What is {a} plus {b}?", "{a} + {b} = ?",
                 "How much is {a}+{b}?"],
           "-": ["{a}-{b}=?", "What is {a} - {b}?", "Subtract {b} from {a}.", "What is {a} minus {b}?", "{a} - {b} = ?",
                 "How much is {a}-{b}?"]},
    "zh": {"+": ["{a}+{b}=?", "{a}加{b}等于多少？", "计算{a}+{b}", "{a}+{b}等于几？", "算一下{a}加{b}",
                 "{a}+{b}是多少？"],
           "-": ["{a}-{b}=?", "{a}减{b}等于多少？", "计算{a}-{b}", "{a}-{b}等于几？", "算一下{a}减{b}",
                 "{a}-{b}是多少？"]},
}  # fmt: skip
PLACE_VALUES = {"en": ["ones", "tens", "hundreds"], "zh": ["个位", "十位", "百位"]}


def working(a: int, b: int, sign: str, lang: str) -> str:
    """The sum worked out digit by digit from the right, as at school; a >= b when subtracting."""
    lines, carry = [], 0
    for i in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**i % 10, b // 10**i % 10
        carried = f"{sign}1" if carry else ""
        name = PLACE_VALUES[lang][i]
        if sign == "+":
            total = x + y + carry
            carry = total // 10
            note = ("进1" if lang == "zh" else " carry 1") if carry else ""
            lines.append(f"{name} {x}+{y}{carried}={total}{note}")
        else:
            total = x - y - carry
            carry = int(total < 0)
            note = ("借1" if lang == "zh" else " borrow 1") if carry else ""
            lines.append(f"{name} {x + 10 * carry}-{y}{carried}={total + 10 * carry}{note}")
    return ("；" if lang == "zh" else "; ").join(lines)


def sum_of_two(rng: Random, lang: str) -> Round:
    """An addition or subtraction of numbers of up to three digits; the smallest ones are never held out."""
    sign = rng.choice("+-")
    a, b = (rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3, 3))) for _ in range(2))
    if sign == "-" and a < b and rng.random() < 0.75:
        a, b = b, a
    value = a + b if sign == "+" else a - b
    ask = slot(rng.choice(SUMS[lang][sign]), a=a, b=b)
    if sign == "-" and a < b:
        first = {"en": f"{a}<{b}, so {b}-{a}: ", "zh": f"{a}<{b}，先算{b}-{a}："}[lang]
        think = first + working(b, a, sign, lang) + {"en": f"; {b - a}, negative", "zh": f"；{b - a}，取负"}[lang]
    else:
        think = working(a, b, sign, lang)
    think += {"en": f"; so {value}", "zh": f"；得{value}"}[lang]
    key = f"{a}{sign}{b}"
    return Round("sum", "" if a < 20 and b < 20 else key, ask, f"{key}={value}", think, answers=[f"={value}"])


# ---- small talk -------------------------------------------------------------------------------------------------

SMALL_TALK = {
    "en": [
        ("Hi|Hello|Hello!|Hey there|Good morning|Good evening|Hi, how are you?|How are you?|Hello, nice to meet you.",
         "Hello! I am glimmer's demo model. Ask me about a city, a sum, or give me a tool."),
        ("Who are you?|What is your name?|What are you?|Introduce yourself.|Tell me about yourself.|Are you GLM-4.5?|What model are you?|Are you ChatGPT?",
         "I am the demo model of glimmer: a very small model built like GLM-4.5, made for trying things out."),
        ("What can you do?|How can you help me?|What are you good at?|What do you know?|Help|What should I ask you?",
         "I can introduce about a hundred cities, add and subtract numbers, call tools, and fill small JSON objects, in English and Chinese."),
        ("Who made you?|Who trained you?|Where do you come from?|Who created you?|Who built you?",
         "I was trained from scratch by the glimmer project, on a computer without a graphics card."),
        ("How big are you?|How many parameters do you have?|Are you a large model?|Are you small?",
         "I am tiny: a few million parameters, about a hundred thousand times smaller than GLM-4.5."),
        ("Can I trust you?|Are you always right?|Are your answers correct?|Do you make mistakes?",
         "Please do not rely on me. I am a toy for trying and testing, not a source of facts."),
        ("Thanks|Thank you|Thank you very much!|Thanks a lot.|Great, thanks!", "You are welcome!"),
        ("Bye|Goodbye|See you|Good night|Bye, see you tomorrow.", "Goodbye! It was nice to talk to you."),
        ("Tell me a joke.|Do you know a joke?|Make me laugh.|Say something funny.",
         "Why did the token cross the network? To get to the other expert."),
        ("Are you a human?|Are you real?|Are you alive?|Do you have feelings?",
         "No, I am a small language model: only numbers and arithmetic."),
        ("What languages do you speak?|Do you speak Chinese?|Which languages do you know?|Do you speak English?",
         "I speak a little English and a little Chinese."),
    ],
    "zh": [
        ("你好|你好！|您好|嗨|早上好|晚上好|你好吗？|最近怎么样？|很高兴认识你",
         "你好！我是 glimmer 的演示模型。你可以问我城市、算术题，或者给我工具。"),
        ("你是谁？|你叫什么名字？|你是什么？|介绍一下你自己|请做个自我介绍|你是GLM-4.5吗？|你是什么模型？|你是ChatGPT吗？",
         "我是 glimmer 的演示模型：一个结构和 GLM-4.5 相同的很小的模型，供大家试用。"),
        ("你能做什么？|你会什么？|你能帮我什么？|你擅长什么？|你知道什么？|我该问你什么？",
         "我能介绍一百多座城市，做加减法，调用工具，填写小的 JSON 对象，会说中文和英文。"),
        ("谁创造了你？|谁训练了你？|你从哪里来？|你是谁做的？|谁开发了你？",
         "我是 glimmer 项目从头训练的，用的是没有显卡的电脑。"),
        ("你有多大？|你有多少参数？|你是大模型吗？|你很小吗？", "我很小：只有几百万个参数，比 GLM-4.5 小大约十万倍。"),
        ("你的话可信吗？|你总是对的吗？|你的回答正确吗？|你会犯错吗？",
         "请不要依赖我。我是用来试用和测试的玩具，不是知识的来源。"),
        ("谢谢|谢谢你|非常感谢！|多谢|太好了，谢谢！", "不客气！"),
        ("再见|拜拜|回头见|晚安|再见，明天见", "再见！很高兴和你聊天。"),
        ("讲个笑话|你会讲笑话吗？|逗我笑|说点有趣的", "为什么词元要穿过网络？因为它想去见另一位专家。"),
        ("你是人吗？|你是真的吗？|你有生命吗？|你有感情吗？", "不是，我是一个小小的语言模型，只有数字和运算。"),
        ("你会说哪些语言？|你会说英语吗？|你懂什么语言？|你会说中文吗？", "我会说一点中文和一点英文。"),
    ],
}  # fmt: skip


def small_talk(rng: Random, lang: str) -> Round:
    """A few words about itself. Nothing here is held out: the list is short, and there is nothing to generalise."""
    asks, reply = rng.choice(SMALL_TALK[lang])
    think = {"en": "A simple remark; I answer it.", "zh": "这是闲聊，直接回答。"}[lang]
    return Round("small talk", "", rng.choice(asks.split("|")), reply, think)


def repeat(rng: Random, lang: str, strange: bool = False) -> Round:
    """Say it after me: the plainest exercise in copying; `strange` words are made of any tokens."""
    draw = {
        "strange": lambda: rng.choice((str.lower, str.lower, str.title))(coined(rng, lang)),
        "en": lambda: rng.choice([invented(rng, "en").lower(), rng.choice(GOODS["en"]), rng.choice(COLOURS["en"]),
                                  str(rng.randrange(1000))]),
        "zh": lambda: rng.choice([invented(rng, "zh"), rng.choice(GOODS["zh"]), rng.choice(COLOURS["zh"]),
                                  str(rng.randrange(1000))]),
    }["strange" if strange else lang]  # fmt: skip
    text = {"en": " ", "zh": "，"}[lang].join(f"{SEPARATOR}{draw()}{SEPARATOR}" for _ in range(rng.randrange(2, 7)))
    ask = rng.choice(
        {
            "en": ["Repeat: {}", "Say after me: {}", "Please repeat this: {}"],
            "zh": ["请重复：{}", "跟我说：{}", "重复这句话：{}"],
        }[lang]
    )
    think = {"en": "I repeat the words.", "zh": "照样重复。"}[lang]
    return Round("repeat", text, ask.format(text), text, think, answers=[text])


# ---- JSON -------------------------------------------------------------------------------------------------------

FORMS = {
    "en": [
        (["{name} is {age} years old, works as a {job} and lives in {city}.",
          "My friend {name}, a {job} from {city}, is {age}.",
          "I met {name} in {city}: {age} years old and a {job}."], ("name", "age", "job", "city")),
        (["{name} ordered {count} {item} for {price} dollars.",
          "Please send {count} {item} to {name}; the price is {price}.",
          "{count} {item} at {price} each, says {name}."], ("name", "item", "count", "price")),
        (["The {event} is on {day} in {city}, with {name}.", "{name} invites you to the {event} in {city} on {day}.",
          "On {day} there is a {event} in {city}; ask {name}."], ("event", "day", "city", "name")),
        (["{name} has a {colour} car and {member} a member.",
          "The {colour} bag belongs to {name}, who {member} a member.",
          "{name} {member} a member and likes {colour}."], ("name", "colour", "member")),
    ],
    "zh": [
        (["{name}今年{age}岁，是{job}，住在{city}。", "我的朋友{name}是{city}的{job}，{age}岁。",
          "{name}，{age}岁，在{city}当{job}。"],
         ("name", "age", "job", "city")),
        (["{name}买了{count}份{item}，价格是{price}元。", "给{name}送{count}份{item}，每份{price}元。",
          "{item}{count}份，{price}元，收货人{name}。"],
         ("name", "item", "count", "price")),
        (["{day}在{city}有{event}，联系人是{name}。", "{name}邀请你{day}去{city}参加{event}。",
          "{event}定在{day}，地点{city}，找{name}。"],
         ("event", "day", "city", "name")),
        (["{name}的车是{colour}，{member}会员。", "{colour}的包是{name}的，他{member}会员。",
          "{name}{member}会员，喜欢{colour}。"],
         ("name", "colour", "member")),
    ],
}  # fmt: skip
KEYS_ZH = {"name": "姓名", "age": "年龄", "job": "职业", "city": "城市", "item": "物品", "count": "数量",
           "price": "价格",
           "event": "活动", "day": "日期", "colour": "颜色", "member": "会员"}  # fmt: skip
FILL = {
    "en": ["Fill a JSON object with the keys {keys}: {sentence}", "Answer in JSON with {keys}. {sentence}",
           "Extract {keys} as JSON: {sentence}"],
    "zh": ["按 {keys} 填写 JSON：{sentence}", "用 JSON 回答，键为 {keys}。{sentence}",
           "提取 {keys}，输出 JSON：{sentence}"],
}  # fmt: skip


def form(rng: Random, lang: str) -> Round:
    """A sentence, some keys, and the small JSON object that holds their values."""
    sentences, keys = rng.choice(FORMS[lang])
    member = rng.random() < 0.5
    values = {
        "name": person(rng, lang), "age": rng.randrange(18, 90), "job": rng.choice(JOBS[lang]),
        "city": place(rng, lang),
        "item": rng.choice(GOODS[lang]), "count": rng.randrange(2, 100),
        "price": rng.choice([rng.randrange(1, 500), rng.randrange(10, 999) / 10]),
        "event": rng.choice(EVENTS[lang]), "day": rng.choice(DAYS[lang]), "colour": rng.choice(COLOURS[lang]),
        "member": member,
    }  # fmt: skip
    spoken = {**values, "member": {"en": ("is not", "is"), "zh": ("不是", "是")}[lang][member]}
    sentence = slot(rng.choice(sentences), **spoken)
    asked = rng.sample(keys, rng.randrange(2, len(keys) + 1))
    named = {k: KEYS_ZH[k] for k in asked} if lang == "zh" and rng.random() < 0.5 else {k: k for k in asked}
    listed = ", ".join(f"{SEPARATOR}{named[k]}{SEPARATOR}" for k in asked)
    reply = json.dumps(
        {named[k]: f"{SEPARATOR}{values[k]}{SEPARATOR}" if isinstance(values[k], str) else values[k] for k in asked},
        ensure_ascii=False,
    )
    ask = rng.choice(FILL[lang]).format(keys=listed, sentence=sentence)
    think = {"en": "I fill the keys one by one.", "zh": "逐个填写键。"}[lang]
    return Round("json", sentence, ask, reply, think, answers=[reply])
