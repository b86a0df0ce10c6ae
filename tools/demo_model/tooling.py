"""The grammar of tool use: tools as JSON schemas, requests that need them, the calls, their results, the answers.

Two kinds. Known tools (weather, time, …) come under several names, and are asked for in natural sentences.
Made-up tools are drawn from verbs, nouns and parameters, and asked for by the words of their own schema: they teach to
read a schema. Some nouns and parameters are kept for the held-out split: those tools are wholly new there.
"""


import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from dialogue import SEAM, Round, slot
from words import (
    CHORES,
    COLOURS,
    DAYS,
    GOODS,
    JOBS,
    LANGUAGES,
    MONEY,
    NOTES,
    PEOPLE,
    ROOMS,
    SKIES,
    SONGS,
    TOPICS,
    invented,
    person,
    place,
)

Draw = Callable[[Random, str], Any]


@dataclass(frozen=True)
class Parameter:
    """An argument: its possible names, its JSON type, its description in both languages, and how to draw a value."""

    names: str
    type: str
    text: dict[str, str]
    draw: Draw


@dataclass(frozen=True)
class Tool:
    """A tool before its names are chosen. `asks[lang]` are requests; one that lacks a slot leaves that argument out."""

    names: str
    text: dict[str, str]
    parameters: dict[str, Parameter]
    asks: dict[str, list[str]]
    result: Callable[[Random, str, dict[str, Any]], dict[str, Any]]
    answers: dict[str, str]


@dataclass(frozen=True)
class Chosen:
    """A tool with its names chosen: what the prompt shows."""

    tool: Tool
    name: str
    arguments: dict[str, str]  # parameter key -> the name in the schema
    lang: str  # of the descriptions

    def schema(self) -> dict[str, Any]:
        properties = {}
        for key, parameter in self.tool.parameters.items():
            kind: dict[str, Any] = {"type": parameter.type}
            if parameter.type == "array":
                kind["items"] = {"type": "number" if key == "numbers" else "string"}
            properties[self.arguments[key]] = {**kind, "description": parameter.text[self.lang]}
        parameters: dict[str, Any] = {"type": "object", "properties": properties}
        asks = self.tool.asks["en"]
        if required := [self.arguments[k] for k in self.tool.parameters if all(f"{{{k}}}" in ask for ask in asks)]:
            parameters["required"] = required
        function = {"name": self.name, "description": self.tool.text[self.lang], "parameters": parameters}
        return {"type": "function", "function": function}


def both(en: str, zh: str) -> dict[str, str]:
    return {"en": en, "zh": zh}


def listed(items: list[Any], lang: str) -> str:
    """a, b and c — 甲、乙和丙."""
    words = [f"{SEAM}{item}{SEAM}" for item in items]
    comma, last = (", ", " and ") if lang == "en" else ("、", "和")
    return comma.join(words[:-1]) + last + words[-1]


def clock(rng: Random, lang: str) -> str:
    return f"{rng.randrange(24):02}:{rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02}"


def formula(rng: Random, lang: str) -> str:
    text = str(rng.randrange(1, 1000))
    for _ in range(rng.choice((1, 1, 2))):
        text += rng.choice("+-*/") + str(rng.randrange(1, 1000))
    return text


def some(words: dict[str, list[str]], least: int = 2, most: int = 4) -> Draw:
    return lambda rng, lang: rng.sample(words[lang], rng.randrange(least, most + 1))


def one(words: dict[str, list[str]], new: float = 0.2) -> Draw:
    """A word of the list, or now and then an invented one."""
    return lambda rng, lang: invented(rng, lang) if rng.random() < new else rng.choice(words[lang])


def amount(rng: Random, lang: str) -> float | int:
    return rng.choice((rng.randrange(1, 2000), rng.randrange(10, 2000) / 10))


CITY = Parameter("city location place", "string", both("City", "城市"), place)
KNOWN = [
    Tool("get_weather weather query_weather get_current_weather", both("Get the weather", "查询天气"),
         {"city": CITY, "days": Parameter("days num_days", "integer", both("Days", "天数"),
                           lambda r, t: r.randrange(2, 15))},
         {"en": ["What is the weather in {city}?", "How is the weather in {city} today?", "Weather in {city}?",
                 "Will it rain in {city}?",
                 "Tell me the weather in {city}.", "What's the weather like in {city}?",
                 "Weather in {city} for {days} days",
                 "What will the weather be in {city} over the next {days} days?"],
          "zh": ["{city}天气怎么样？", "查一下{city}的天气", "{city}今天会下雨吗？", "今天{city}的天气如何？",
                 "告诉我{city}天气", "{city}的天气",
                 "{city}未来{days}天的天气", "查询{city}{days}天的天气"]},
         lambda r, t, a: {"temperature": r.randrange(-9, 39), "weather": r.choice(SKIES[t])},
         both("It is {weather} in {city}, {temperature} degrees.", "{city}{weather}，{temperature}度。")),
    Tool("get_time get_current_time current_time time_in", both("Get the current time", "查询当前时间"), {"city": CITY},
         {"en": ["What time is it in {city}?", "Tell me the time in {city}.", "Current time in {city}?",
                 "What is the time in {city} now?"],
          "zh": ["{city}现在几点？", "现在{city}是几点？", "告诉我{city}的时间", "查一下{city}时间"]},
         lambda r, t, a: {"time": clock(r, t)}, both("It is {time} in {city}.", "{city}现在是{time}。")),
    Tool("calculator calculate compute evaluate", both("Evaluate an expression", "计算算式"),
         {"expression": Parameter("expression formula expr", "string", both("Expression", "算式"), formula)},
         {"en": ["Calculate {expression}", "What is {expression}?", "Compute {expression}.",
                 "How much is {expression}?"],
          "zh": ["计算{expression}", "{expression}等于多少？", "算一下{expression}", "{expression}是多少？"]},
         lambda r, t, a: {"result": r.choice((r.randrange(-900, 9000), r.randrange(1, 9000) / 10))},
         both("{expression} = {result}", "{expression} = {result}")),
    Tool("search web_search search_web google", both("Search the web", "搜索网页"),
         {"query": Parameter("query q keywords", "string", both("Query", "关键词"), one(TOPICS)),
          "limit": Parameter("limit count num_results", "integer", both("Number of results", "结果数"),
                           lambda r, t: r.randrange(2, 30))},
         {"en": ["Search for {query}", "Look up {query}.", "Find something about {query}.",
                 "Search the web for {query}.",
                 "Find {limit} results about {query}.", "Search for {query}, {limit} results"],
          "zh": ["搜索{query}", "查一下{query}", "帮我搜{query}", "上网找{query}", "搜索{query}，要{limit}条",
                 "找{limit}条关于{query}的结果"]},
         lambda r, t, a: {"title": r.choice(TOPICS[t]) + " " + str(r.randrange(2000, 2026))},
         both("I found: {title}", "找到：{title}")),
    Tool("translate translate_text translator", both("Translate a text", "翻译文本"),
         {"text": Parameter("text content sentence", "string", both("Text", "文本"), one(NOTES)),
          "language": Parameter("language target target_language", "string", both("Target language", "目标语言"),
                                one(LANGUAGES, 0))},
         {"en": ["Translate \"{text}\" into {language}.", "How do you say \"{text}\" in {language}?",
                 "Put \"{text}\" into {language}."],
          "zh": ["把“{text}”翻译成{language}", "“{text}”用{language}怎么说？", "请将“{text}”译成{language}"]},
         lambda r, t, a: {"translation": f"{invented(r, 'en')} {invented(r, 'en').lower()}"},
         both("{translation}", "{translation}")),
    Tool("set_reminder remind_me add_reminder create_reminder", both("Set a reminder", "设置提醒"),
         {"task": Parameter("task text what", "string", both("What to do", "事项"), one(CHORES, 0)),
          "time": Parameter("time at when", "string", both("Time", "时间"), clock)},
         {"en": ["Remind me to {task} at {time}.", "At {time} I must {task}; remind me.",
                 "Set a reminder for {time}: {task}"],
          "zh": ["{time}提醒我{task}", "提醒我{time}{task}", "设个提醒，{time}{task}"]},
         lambda r, t, a: {"ok": True}, both("Done. I will remind you to {task} at {time}.",
                                            "好的，{time}提醒你{task}。")),
    Tool("convert_currency exchange currency_convert", both("Convert money", "货币换算"),
         {"amount": Parameter("amount value sum", "number", both("Amount", "金额"), amount),
          "source": Parameter("from source from_currency", "string", both("From", "原货币"),
                           lambda r, t: r.choice(MONEY)),
          "target": Parameter("to target to_currency", "string", both("To", "目标货币"), lambda r, t: r.choice(MONEY))},
         {"en": ["Convert {amount} {source} to {target}.", "How much is {amount} {source} in {target}?",
                 "{amount} {source} to {target}"],
          "zh": ["{amount} {source}换成{target}", "把{amount} {source}换算成{target}",
                 "{amount} {source}是多少{target}？"]},
         lambda r, t, a: {"result": r.randrange(10, 90000) / 10},
         both("{amount} {source} is {result} {target}.", "{amount} {source}等于{result} {target}。")),
    Tool("play_music play_song play", both("Play a song", "播放歌曲"),
         {"song": Parameter("song title name", "string", both("Song", "歌名"), one(SONGS))},
         {"en": ["Play {song}.", "I want to hear {song}.", "Put on {song}, please."],
          "zh": ["播放{song}", "我想听{song}", "放一首{song}"]},
         lambda r, t, a: {"ok": True}, both("Now playing {song}.", "正在播放{song}。")),
    Tool("send_message message text_contact", both("Send a message", "发送消息"),
         {"to": Parameter("to recipient contact", "string", both("Recipient", "收件人"), person),
          "text": Parameter("text message body", "string", both("Message", "消息内容"), one(NOTES, 0))},
         {"en": ["Send {to} a message: {text}", "Write to {to}: {text}", "Message {to} that {text}."],
          "zh": ["给{to}发消息：{text}", "告诉{to}：{text}", "发给{to}：{text}"]},
         lambda r, t, a: {"sent": True}, both("I sent the message to {to}.", "已发给{to}。")),
    Tool("set_light switch_light control_light", both("Switch a light", "开关灯"),
         {"room": Parameter("room place where", "string", both("Room", "房间"), one(ROOMS)),
          "on": Parameter("on enabled state", "boolean", both("On or off", "是否打开"), lambda r, t: r.random() < 0.5)},
         {"en": ["Turn {on} the light in the {room}.", "Switch the {room} light {on}.",
                 "Light {on} in the {room}, please."],
          "zh": ["{on}{room}的灯", "请{on}{room}灯", "把{room}的灯{on}"]},
         lambda r, t, a: {"ok": True}, both("The light in the {room} is now {on}.", "{room}的灯已经{on}。")),
    Tool("add_items add_to_list shopping_list", both("Add to the shopping list", "加入购物清单"),
         {"items": Parameter("items goods things", "array", both("Items", "物品"), some(GOODS))},
         {"en": ["Add {items} to the shopping list.", "Put {items} on my list.", "I need to buy {items}."],
          "zh": ["把{items}加入购物清单", "购物清单加上{items}", "我要买{items}"]},
         lambda r, t, a: {"count": len(a["items"])}, both("Your list has {count} more items.",
                                                          "清单增加了{count}项。")),
    Tool("average mean get_average", both("Average of numbers", "求平均数"),
         {"numbers": Parameter("numbers values data", "array", both("Numbers", "数字"),
                               lambda r, t: [r.randrange(100) for _ in range(r.randrange(2, 6))])},
         {"en": ["What is the average of {numbers}?", "Average {numbers}.", "Find the mean of {numbers}."],
          "zh": ["{numbers}的平均数是多少？", "求{numbers}的平均值", "算{numbers}的平均数"]},
         lambda r, t, a: {"result": r.randrange(1, 999) / 10}, both("The average is {result}.", "平均数是{result}。")),
    Tool("get_location where_am_i current_location", both("Get the user's location", "获取用户位置"), {},
         {"en": ["Where am I?", "What is my location?", "Where am I now?"],
          "zh": ["我在哪里？", "我现在在什么地方？", "我的位置是什么？"]},
         lambda r, t, a: {"city": place(r, t)}, both("You are in {city}.", "你在{city}。")),
    Tool("roll_dice roll throw_dice", both("Roll a die", "掷骰子"), {},
         {"en": ["Roll a die.", "Throw the dice for me.", "Please roll the dice."],
          "zh": ["掷骰子", "帮我掷一次骰子", "扔个骰子"]},
         lambda r, t, a: {"value": r.randrange(1, 7)}, both("You rolled {value}.", "掷出了{value}。")),
    Tool("get_balance account_balance balance", both("Get the account balance", "查询余额"), {},
         {"en": ["What is my balance?", "How much money do I have?", "Show my balance."],
          "zh": ["我的余额是多少？", "我还有多少钱？", "查余额"]},
         lambda r, t, a: {"balance": amount(r, t)}, both("Your balance is {balance}.", "余额是{balance}。")),
]  # fmt: skip
SWITCH = {"en": ("off", "on"), "zh": ("关掉", "打开")}

# ---- made-up tools ----------------------------------------------------------------------------------------------

VERBS = [("book", "预订"), ("order", "订购"), ("find", "查找"), ("create", "创建"), ("delete", "删除"),
         ("update", "更新"), ("check", "检查"),
         ("open", "打开"), ("start", "启动"), ("stop", "停止"), ("print", "打印"), ("share", "分享"), ("save", "保存"),
         ("count", "统计"),
         ("list", "列出"), ("rent", "租用"), ("clean", "清理"), ("track", "跟踪")]  # fmt: skip
NOUNS = [("table", "餐桌"), ("ticket", "车票"), ("room", "房间"), ("file", "文件"), ("photo", "照片"),
         ("report", "报告"), ("taxi", "出租车"),
         ("pizza", "披萨"), ("parcel", "包裹"), ("event", "活动"), ("user", "用户"), ("account", "账户"),
         ("robot", "机器人"), ("door", "门"),
         ("camera", "相机"), ("garden", "花园"), ("bike", "自行车"), ("book", "图书"), ("course", "课程"),
         ("device", "设备"), ("folder", "文件夹"),
         ("meal", "餐食"), ("team", "团队"), ("game", "游戏"), ("map", "地图"), ("note", "笔记"), ("task", "任务"),
         ("video", "视频")]  # fmt: skip
NEW_NOUNS = [("boat", "船"), ("lesson", "课时"), ("printer", "打印机"), ("gift", "礼物"), ("flight", "航班"),
             ("invoice", "发票")]
FREE = [
    Parameter("name", "string", both("name", "名称"), person),
    Parameter("title", "string", both("title", "标题"), one(TOPICS)),
    Parameter("city", "string", both("city", "城市"), place),
    Parameter("owner", "string", both("owner", "所有者"), person),
    Parameter("day", "string", both("day", "日期"), one(DAYS, 0)),
    Parameter("time", "string", both("time", "时间"), clock),
    Parameter("color", "string", both("color", "颜色"), one(COLOURS, 0)),
    Parameter("label", "string", both("label", "标签"), one(GOODS, 0.5)),
    Parameter("code", "string", both("code", "代码"), lambda r, t: f"{r.choice('ABCDEFGH')}{r.randrange(1000)}"),
    Parameter("count", "integer", both("count", "数量"), lambda r, t: r.randrange(1, 100)),
    Parameter("size", "integer", both("size", "大小"), lambda r, t: r.randrange(1, 1000)),
    Parameter("page", "integer", both("page", "页码"), lambda r, t: r.randrange(1, 500)),
    Parameter("price", "number", both("price", "价格"), amount),
    Parameter("weight", "number", both("weight", "重量"), amount),
    Parameter("urgent", "boolean", both("urgent", "加急"), lambda r, t: r.random() < 0.5),
    Parameter("public", "boolean", both("public", "公开"), lambda r, t: r.random() < 0.5),
    Parameter("paid", "boolean", both("paid", "已付款"), lambda r, t: r.random() < 0.5),
    Parameter("tags", "array", both("tags", "标记"), some(COLOURS)),
    Parameter("members", "array", both("members", "成员"), some(PEOPLE)),
    Parameter("parts", "array", both("parts", "部件"), some(GOODS)),
]  # fmt: skip
NEW_FREE = [
    Parameter("street", "string", both("street", "街道"), person),
    Parameter("guests", "integer", both("guests", "客人"), lambda r, t: r.randrange(1, 100)),
    Parameter("discount", "number", both("discount", "折扣"), amount),
    Parameter("private", "boolean", both("private", "私人"), lambda r, t: r.random() < 0.5),
    Parameter("toppings", "array", both("toppings", "配料"), some(GOODS)),
]
YES = {"en": ("no", "yes"), "zh": ("否", "是")}


def strange_word(rng: Random) -> tuple[str, str]:
    """A word and its Chinese, which belong together nowhere else."""
    if rng.random() < 0.3:
        at = rng.randrange(24)
        english, chinese = rng.choice([list(words.values()) for words in (GOODS, JOBS, COLOURS)])
        return english[at % len(english)], chinese[at % len(chinese)]
    letters = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randrange(3, 8)))
    return rng.choice((letters, invented(rng, "en").lower())), invented(rng, "zh")


def made_up(rng: Random, lang: str, fresh: bool, strange: float = 0.0) -> Chosen:
    """A tool nobody has, described in one language; with `fresh`, its noun and a parameter are new to training.

    strange: how probable it is that a noun or a parameter is a word that exists only in this prompt.
    """
    (verb, verb_zh), (noun, noun_zh) = rng.choice(VERBS), rng.choice(NEW_NOUNS if fresh else NOUNS)
    drawn = rng.sample(FREE, rng.choice((0, 1, 1, 2, 2, 3)))
    if strange and rng.random() < strange:
        noun, noun_zh = strange_word(rng)
    for i, parameter in enumerate(drawn):
        if strange and rng.random() < strange:
            name, chinese = strange_word(rng)
            drawn[i] = Parameter(name, parameter.type, both(name, chinese), parameter.draw)
    if fresh and drawn:
        drawn[rng.randrange(len(drawn))] = rng.choice(NEW_FREE)
    parameters = {p.names: p for p in drawn}
    asks = {}
    heads = (("en", [f"{verb.capitalize()} the {noun}", f"Please {verb} the {noun}"]),
             ("zh", [f"{verb_zh}{noun_zh}", f"请{verb_zh}{noun_zh}"]))
    for tongue, head in heads:
        colon, comma, opening, stop = (" ", ", ", ": ", ".") if tongue == "en" else ("是", "，", "，", "")
        told = comma.join(f"{p.text[tongue]}{colon}{{{k}}}" for k, p in parameters.items())
        asks[tongue] = [h + (opening + told if told else "") + stop for h in head]
    tool = Tool(f"{verb}_{noun}", both(f"{verb.capitalize()} the {noun}", f"{verb_zh}{noun_zh}"), parameters, asks,
                lambda r, t, a: {"id": r.randrange(1000)}, both("Done: {id}", "完成：{id}"))  # fmt: skip
    return Chosen(tool, tool.names, {k: k for k in parameters}, lang)


def known(rng: Random, tool: Tool, strange: float = 0.0) -> Chosen:
    """A known tool under some of its names; with `strange`, often under names that only this prompt gives it."""
    if strange and rng.random() < strange:
        keys = {key: strange_word(rng)[0] for key in tool.parameters}
        if len(set(keys.values())) == len(keys):
            return Chosen(tool, f"{strange_word(rng)[0]}_{strange_word(rng)[0]}", keys, rng.choice(("en", "zh")))
    names = {key: rng.choice(p.names.split()) for key, p in tool.parameters.items()}
    if len(set(names.values())) < len(names):
        names = {key: p.names.split()[0] for key, p in tool.parameters.items()}
    return Chosen(tool, rng.choice(tool.names.split()), names, rng.choice(("en", "zh")))


def toolbox(rng: Random, lang: str, fresh: bool = False, strange: float = 0.0) -> list[Chosen]:
    """One to four tools that cannot be confused, in random order; with `fresh`, one of them at least is new."""
    count = rng.choice((1, 2, 2, 3, 3, 4))
    familiar = rng.randrange(count) if fresh else sum(rng.random() < 0.55 for _ in range(count))
    box = [known(rng, tool, strange) for tool in rng.sample(KNOWN, familiar)]
    while len(box) < count:
        new = made_up(rng, lang, fresh, strange)
        if new.name not in [c.name for c in box]:
            box.append(new)
    rng.shuffle(box)
    return box


def spoken(value: Any, key: str, lang: str) -> str:
    """A value as a request words it."""
    if isinstance(value, bool):
        return (SWITCH if key == "on" else YES)[lang][value]
    return listed(value, lang) if isinstance(value, list) else str(value)


def _one_call(rng: Random, lang: str, chosen: Chosen, ask: str) -> tuple[str, dict[str, Any], str, str]:
    """An ask template filled -> (request, arguments under their schema names, result, answer)."""
    tool = chosen.tool
    values = {k: p.draw(rng, lang) for k, p in tool.parameters.items() if f"{{{k}}}" in ask}
    words = {k: spoken(v, k, lang) for k, v in values.items()}
    result = tool.result(rng, lang, values)
    arguments = {chosen.arguments[k]: v for k, v in values.items()}
    return slot(ask, **words), arguments, json.dumps(result, ensure_ascii=False), slot(tool.answers[lang], **words,
                                                                                       **result)


def request(rng: Random, lang: str, box: list[Chosen], target: Chosen | None = None) -> Round:
    """A request that one tool of the box serves: called once, or twice for two places."""
    chosen = target or rng.choice(box)
    tool = chosen.tool
    double = chosen.tool in KNOWN and "city" in tool.parameters and rng.random() < 0.3
    asks = tool.asks[lang]
    ask = rng.choice([a for a in asks if "{days}" not in a and "{limit}" not in a] if double else asks)
    if double:
        _, first, result, answer = _one_call(rng, lang, chosen, ask)
        _, second, other, other_answer = _one_call(rng, lang, chosen, ask)
        key = chosen.arguments["city"]
        while second[key] == first[key]:
            _, second, other, other_answer = _one_call(rng, lang, chosen, ask)
        request_text = slot(ask, city=listed([first[key], second[key]], lang))
        calls, results = [(chosen.name, first), (chosen.name, second)], [result, other]
        answer = answer + (" " if lang == "en" else "") + other_answer
    else:
        request_text, arguments, result, answer = _one_call(rng, lang, chosen, ask)
        calls, results = [(chosen.name, arguments)], [result]
    think = slot({"en": "I call {name}.", "zh": "调用 {name}。"}[lang], name=chosen.name)
    done = {"en": "I have the result.", "zh": "有结果了。"}[lang]
    key = request_text if tool.parameters else ""
    return Round("tool", key, request_text, answer, think, calls, results, done, answers=[answer])
