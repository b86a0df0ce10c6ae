"""The grammar of tool use: tools as JSON schemas, requests that need them, the calls, their results, the answers.

Two kinds. Known tools (weather, time, …; known.py) come under several names, and are asked for in natural sentences.
Made-up tools are drawn from verbs, nouns and parameters, and asked for by the words of their own schema: they teach to
read a schema. Some nouns and parameters (UNSEEN) are kept from training: those tools are wholly new to whoever is asked.
"""

# ruff: noqa: E501  (Chinese counts double; the tables read best as they are)

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from dialogue import SEPARATOR, Round, slot
from known import KNOWN, Draw, Parameter, Tool, amount, any_of, both, clock, number, one, some
from phrases import english
from words import COLOURS, DAYS, EVENTS, GOODS, JOBS, PEOPLE, PLACES, coined, invented, person, place


@dataclass(frozen=True)
class Chosen:
    """A tool with its names chosen, and the schema that the prompt shows."""

    tool: Tool
    name: str
    arguments: dict[str, str]  # parameter key -> the name in the schema, in the schema's order
    schema: dict[str, Any]


def choose(rng: Random, tool: Tool, name: str, arguments: dict[str, str], lang: str, bare: bool) -> Chosen:
    """The tool under these names, its schema written as one or another author would.

    Parameters come in any order; some are told apart by name alone (where `bare` allows it), some tools take one more
    that nobody mentions. lang: of the descriptions.
    """
    order = rng.sample(list(tool.parameters), len(tool.parameters))
    properties: dict[str, dict[str, Any]] = {}
    describe, text_first = not (bare and rng.random() < 0.3), rng.random() < 0.3
    for key in order:
        parameter = tool.parameters[key]
        kind: dict[str, Any] = {"type": parameter.type}
        if parameter.type == "array":
            kind["items"] = {"type": "number" if key == "numbers" else "string"}
        text = {"description": rng.choice(parameter.text[lang].split("|"))} if describe else {}
        properties[arguments[key]] = {**text, **kind} if text_first else {**kind, **text}
    if rng.random() < 0.15:
        extra, kind = rng.choice(UNMENTIONED)
        if extra not in properties:
            told = list(properties.items())
            told.insert(rng.randrange(len(told) + 1), (extra, kind))
            properties = dict(told)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    asks = tool.asks["en"]
    if required := [arguments[k] for k in order if all(f"{{{k}}}" in ask for ask in asks)]:
        parameters["required"] = required
    function = {"name": name, "description": rng.choice(tool.text[lang].split("|")), "parameters": parameters}
    schema = {"type": "function", "function": function}
    return Chosen(tool, name, {key: arguments[key] for key in order}, schema)


UNMENTIONED: list[tuple[str, dict[str, Any]]] = [
    ("unit", {"type": "string", "enum": ["celsius", "fahrenheit"]}),
    ("format", {"type": "string", "enum": ["short", "long"]}),
    ("timeout", {"type": "integer", "description": "Seconds to wait"}),
    ("verbose", {"type": "boolean", "description": "Tell more"}),
    ("detail", {"type": "boolean"}),
    ("locale", {"type": "string", "description": "Locale"}),
]


def tool_name(rng: Random, names: str) -> str:
    """weather, get_weather, getWeather or weather_get, from "get query/weather forecast"."""
    verb, noun = (rng.choice(half.split()) for half in names.split("/"))
    style = rng.random()
    if style < 0.2:
        return noun
    if style < 0.3:
        return verb + noun.title().replace("_", "")
    return f"{noun}_{verb}" if style < 0.4 else f"{verb}_{noun}"


CARRIERS = {  # what may be said before and after a request
    "en": ("Hi! |Hello, |Hey, |Quick question: |One more thing: |I need your help. |Could you help me? |OK, |Next: |So, |Listen: |Sorry to ask: |Well, ",
           " Thanks.| Thank you!| Please.| Be quick.| It is important.| I am in a hurry.| Thanks a lot!"),
    "zh": ("你好，|请问，|麻烦你：|帮个忙，|还有，|接下来，|对了，|好的，|有件事：|不好意思，|嗨，|喂，", " 谢谢。| 谢谢！| 拜托了。| 我很急。| 这很重要。| 多谢！"),
}  # fmt: skip


def carried(rng: Random, lang: str, ask: str) -> str:
    """A request's template, sometimes with a greeting before it, or thanks where they cannot seem part of a value."""
    before, after = (part.split("|") for part in CARRIERS[lang])
    if rng.random() < 0.2 and ask[-1] in ".?!。？！":
        ask += rng.choice(after)
    return rng.choice(before) + ask if rng.random() < 0.25 else ask


def renamed(rng: Random, name: str) -> str:
    """A parameter's name, sometimes as one or another author would extend it: new_name, name_value, theName."""
    style = rng.random()
    if style < 0.1:
        return f"{rng.choice(('the', 'my', 'new', 'given', 'user', 'input', 'chosen'))}_{name}"
    if style < 0.2:
        return f"{name}_{rng.choice(('value', 'arg', 'id', 'string', 'field', 'param', 'info'))}"
    if style < 0.25:
        return rng.choice(("the", "my", "new", "given", "user")) + name.title().replace("_", "")
    return name


def listed(items: list[Any], lang: str) -> str:
    """a, b and c — 甲、乙和丙."""
    words = [f"{SEPARATOR}{item}{SEPARATOR}" for item in items]
    comma, last = (", ", " and ") if lang == "en" else ("、", "和")
    return comma.join(words[:-1]) + last + words[-1]


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
WORDS = {  # parameters of made-up tools, by type; what is told of them is the word itself
    "string": "name 名称 title 标题 city 城市 owner 所有者 day 日期 time 时间 color 颜色 label 标签 code 代码 subject 主题 "
    "author 作者 driver 司机 format 格式 model 型号 brand 品牌 country 国家 language 语言 status 状态 reason 原因 address 地址 "
    "topic 话题 destination 目的地 comment 评论 category 类别 section 栏目 customer 顾客 style 风格 material 材料 shape 形状 "
    "contact 联系人 origin 出发地 target 目标 nickname 昵称 level 级别 season 季节 taste 口味 zone 区域",
    "integer": "count 数量 size 大小 page 页码 seats 座位 year 年份 rounds 轮数 floor 楼层 copies 份数 age 年龄 rank 名次 "
    "minutes 分钟 hours 小时 width 宽度 height 高度 limit 上限 port 端口 speed 速度 volume 音量",
    "number": "price 价格 weight 重量 length 长度 cost 费用 rate 比率 score 分数 distance 距离 temperature 温度 budget 预算 tax 税",
    "boolean": "urgent 加急 public 公开 paid 已付款 shared 共享 visible 可见 locked 锁定 fresh 新鲜 insured 投保 express 快递 "
    "quiet 安静",
    "array": "tags 标记 members 成员 parts 部件 names 名单 colors 颜色表 extras 附加项 goods 货物 topics 话题表 rooms 房间表 players 球员",
}
DRAWS: dict[str, list[Draw]] = {
    "string": [person, place, clock, any_of("topic"), one(DAYS, 0), one(COLOURS, 0), one(GOODS, 0.5), invented,
               any_of("song"), any_of("note"), any_of("room"),
               lambda r, t: f"{r.choice('ABCDEFGH')}{r.randrange(1000)}"],
    "integer": [number(1, 100), number(1, 1000)],
    "number": [amount],
    "boolean": [lambda r, t: r.random() < 0.5],
    "array": [some(COLOURS), some(PEOPLE), some(GOODS)],
}  # fmt: skip
TYPES = ("string", "string", "string", "integer", "integer", "number", "boolean", "array")


def free(rng: Random) -> Parameter:
    """A parameter of a made-up tool."""
    kind = rng.choice(TYPES)
    pairs = WORDS[kind].split()
    at = 2 * rng.randrange(len(pairs) // 2)
    return Parameter(pairs[at], kind, both(pairs[at].replace("_", " "), pairs[at + 1]), rng.choice(DRAWS[kind]))


@dataclass(frozen=True)
class Unseen:
    """Nouns and parameters of tools that only held-out questions show, or only trial ones."""

    nouns: list[tuple[str, str]]
    parameters: list[Parameter]

    def words(self) -> set[str]:
        """In both languages."""
        return {word for noun in self.nouns for word in noun} | {
            w for p in self.parameters for w in (p.names, p.text["zh"])
        }


def unseen(nouns: str, **parameters: str) -> Unseen:
    """From words and their Chinese in turn, "boat 船 lesson 课时"; the parameters' by JSON type."""
    draws = {"string": person, "integer": number(1, 100), "number": amount, "boolean": lambda r, t: r.random() < 0.5,
             "array": some(GOODS)}  # fmt: skip
    pairs = lambda words: zip(words.split()[::2], words.split()[1::2], strict=True)
    return Unseen(list(pairs(nouns)), [Parameter(name, kind, both(name, chinese), draws[kind])
                                       for kind, words in parameters.items() for name, chinese in pairs(words)])  # fmt: skip


FEW_UNSEEN = unseen(
    "boat 船 lesson 课时 printer 打印机 gift 礼物 flight 航班 invoice 发票",
    string="street 街道", integer="guests 客人", number="discount 折扣", boolean="private 私人", array="toppings 配料",
)  # fmt: skip
MANY_UNSEEN = unseen(
    "harbor 港口 ladder 梯子 magnet 磁铁 orchid 兰花 pillow 枕头 rocket 火箭 saddle 马鞍 statue 雕像 tractor 拖拉机 umbrella 雨伞 vaccine 疫苗 "
    "wallet 钱包 windmill 风车 blanket 毯子 canoe 独木舟 drawer 抽屉 engine 发动机 guitar 吉他 hammer 锤子 blender 搅拌机 kettle 水壶 locker 储物柜",
    string="passenger 乘客 district 区县 fabric 面料 mentor 导师 sponsor 赞助商 venue 场馆",
    integer="voltage 电压 altitude 海拔 workers 工人", number="humidity 湿度 salary 薪水 mileage 里程 thickness 厚度",
    boolean="digital 数字 waterproof 防水 refundable 可退款", array="flavors 风味 ingredients 原料 sensors 传感器 chapters 章节",
)  # fmt: skip
TRIAL_UNSEEN = unseen(
    "anchor 锚 cactus 仙人掌 compass 指南针 lobster 龙虾 helmet 头盔 lantern 灯笼 meadow 草地 pepper 胡椒 pirate 海盗 puzzle 拼图 scooter 滑板车 "
    "trumpet 小号 violin 小提琴 wagon 马车 zipper 拉链",
    string="surname 姓氏 landlord 房东 dialect 方言 seller 卖家", integer="laps 圈数 shifts 班次", number="depth 深度 profit 利润 density 密度",
    boolean="portable 便携 heated 加热 licensed 持证", array="trophies 奖杯 awards 奖项 gadgets 小工具",
)  # fmt: skip
UNSEEN = FEW_UNSEEN.words() | MANY_UNSEEN.words() | TRIAL_UNSEEN.words()
YES = {"en": ("no", "yes"), "zh": ("否", "是")}


# English words, whose beginnings and ends make new ones: most pieces that a new word may be spelled with occur in some.
ENGLISH = sorted(
    english() | {word.lower() for words in (JOBS, COLOURS, EVENTS, PLACES) for phrase in words["en"] for word in phrase.split() if len(word) > 3}
    | {word for words in WORDS.values() for word in words.split()[::2]} | {noun for noun, _ in NOUNS}
)  # fmt: skip


def strange_word(rng: Random) -> tuple[str, str]:
    """A word and its Chinese, which belong together nowhere else; never one of the unseen."""
    if rng.random() < 0.3:
        at = rng.randrange(24)
        words, chinese = rng.choice([list(words.values()) for words in (GOODS, JOBS, COLOURS)])
        return words[at % len(words)], chinese[at % len(chinese)]
    letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(3, 8)))
    first, second = rng.choice(ENGLISH), rng.choice(ENGLISH)
    blend = first[: rng.randrange(2, 6)] + second[-rng.randrange(2, 6) :]
    word = rng.choice((letters, invented(rng, "en").lower(), blend, *(coined(rng) for _ in range(5))))
    ending = rng.choice(("", "", "", "", "_name", "_id", "_list", f"_{coined(rng)}"))
    chinese = coined(rng, "zh") if rng.random() < 0.7 else invented(rng, "zh")
    if UNSEEN & {word, ending[1:], chinese}:
        return strange_word(rng)
    return word + ending, chinese


HEADS = {  # what is asked of a made-up tool, and how its arguments are told: link, comma, opening, stop
    "en": [
        "{Do} the {thing}",
        "Please {do} the {thing}",
        "I want to {do} the {thing}",
        "Can you {do} the {thing}",
        "Now {do} the {thing}",
        "Help me {do} the {thing}",
        "It is time to {do} the {thing}",
    ],
    "zh": [
        "{do}{thing}",
        "请{do}{thing}",
        "我想{do}{thing}",
        "帮我{do}{thing}",
        "现在{do}{thing}",
        "麻烦{do}{thing}",
        "该{do}{thing}了",
    ],
}
FORMS = {
    "en": [(" ", ", ", ": ", "."), (" is ", "; ", ". ", "."), (" ", " and ", " with ", ""), (": ", ", ", ", ", "."), (" = ", ", ", " (", ")"), (" should be ", "; ", ": ", ".")],
    "zh": [("是", "，", "，", ""), ("", "，", "：", "。"), ("为", "、", "，", ""), ("：", "；", "，", "。"), ("=", "，", "（", "）"), ("要", "，", "。", "")],
}  # fmt: skip


def made_up(rng: Random, lang: str, fresh: Unseen | None = None, strange: float = 0.0) -> Chosen:
    """A tool nobody has, described in one language; its noun and a parameter are of the `fresh`, if there are any.

    strange: how probable it is that a noun or a parameter is a word that exists only in this prompt.
    """
    (verb, verb_zh), (noun, noun_zh) = rng.choice(VERBS), rng.choice(fresh.nouns if fresh else NOUNS)
    drawn = [free(rng) for _ in range(rng.choice((0, 1, 1, 2, 2, 3)))]
    if rng.random() < strange:
        noun, noun_zh = strange_word(rng)
    for i, parameter in enumerate(drawn):
        if rng.random() < strange:
            name, chinese = strange_word(rng)
            drawn[i] = Parameter(name, parameter.type, both(name, chinese), parameter.draw)
    if fresh and drawn:
        drawn[rng.randrange(len(drawn))] = rng.choice(fresh.parameters)
    parameters = {p.names: p for p in drawn}
    form, asks = rng.randrange(len(FORMS["en"])), {}
    for tongue, do, thing in (("en", verb, noun), ("zh", verb_zh, noun_zh)):
        link, comma, opening, stop = FORMS[tongue][form]
        told = comma.join(f"{SEPARATOR}{p.text[tongue]}{SEPARATOR}{link}{{{k}}}" for k, p in parameters.items())
        heads = (
            head.format(do=do, Do=do.capitalize(), thing=f"{SEPARATOR}{thing}{SEPARATOR}") for head in HEADS[tongue]
        )
        asks[tongue] = [head + (opening + told + stop if told else "") for head in heads]
    tool = Tool(f"{verb}/{noun}", both(f"{verb.capitalize()} the {noun}", f"{verb_zh}{noun_zh}"), parameters, asks,
                lambda r, t, a: {"id": r.randrange(1000)}, both("Done: {id}", "完成：{id}"))  # fmt: skip
    return choose(rng, tool, f"{verb}_{noun}", {k: k for k in parameters}, lang, bare=lang == "en")


def known(rng: Random, tool: Tool, strange: float = 0.0) -> Chosen:
    """A known tool under some of its names; with `strange`, often under names that only this prompt gives it."""
    lang, name = rng.choice(("en", "zh")), tool_name(rng, tool.names)
    if rng.random() < strange:
        name = rng.choice((name, f"{strange_word(rng)[0]}_{strange_word(rng)[0]}"))
        names = {key: strange_word(rng)[0] for key in tool.parameters}
    else:
        names = {key: renamed(rng, rng.choice(p.names.split())) for key, p in tool.parameters.items()}
    if len(set(names.values())) < len(names):
        names = {key: p.names.split()[0] for key, p in tool.parameters.items()}
    return choose(rng, tool, name, names, lang, bare=False)


def toolbox(rng: Random, lang: str, fresh: Unseen | None = None, strange: float = 0.0, most: int = 4) -> list[Chosen]:
    """One to `most` tools that cannot be confused, in random order; one of them at least has words of the `fresh`."""
    count = min(rng.choice((1, 2, 2, 3, 3, 4)), most)
    familiar = rng.randrange(count) if fresh else sum(rng.random() < 0.55 for _ in range(count))
    box: list[Chosen] = []
    tools = rng.sample(KNOWN, familiar)
    while len(box) < count:
        new = known(rng, tools[len(box)], strange) if len(box) < familiar else made_up(rng, lang, fresh, strange)
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
    values = {k: tool.parameters[k].draw(rng, lang) for k in chosen.arguments if f"{{{k}}}" in ask}
    words = {k: spoken(v, k, lang) for k, v in values.items()}
    result = tool.result(rng, lang, values)
    arguments = {chosen.arguments[k]: v for k, v in values.items()}
    answer = slot(tool.answers[lang], **words | result)
    return slot(ask, **words), arguments, json.dumps(result, ensure_ascii=False), answer


def of_places(box: list[Chosen]) -> list[Chosen]:
    """The tools of the box that can be asked for two places at once."""
    return [chosen for chosen in box if chosen.tool in KNOWN and "city" in chosen.tool.parameters]


def request(rng: Random, lang: str, box: list[Chosen], target: Chosen | None = None, doubles: float = 0.3) -> Round:
    """A request that one tool of the box serves: called once, or twice for two places if it can be and `doubles`
    says so, how probable that is."""
    chosen = target or rng.choice(box)
    tool = chosen.tool
    double = chosen in of_places(box) and rng.random() < doubles
    asks = tool.asks[lang]
    ask = rng.choice([a for a in asks if "{days}" not in a and "{limit}" not in a] if double else asks)
    ask = carried(rng, lang, ask)
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
