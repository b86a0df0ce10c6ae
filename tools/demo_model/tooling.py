"""The grammar of tool use: tools as JSON schemas, requests that need them, the calls, their results, the answers.

Two kinds. Known tools (weather, time, …) come under several names, and are asked for in natural sentences.
Made-up tools are drawn from verbs, nouns and parameters, and asked for by the words of their own schema: they teach to
read a schema. Some nouns and parameters (UNSEEN) are kept for the held-out split: those tools are wholly new there.
"""

# ruff: noqa: E501  (Chinese counts double; the tables read best as they are)

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
    EVENTS,
    GOODS,
    JOBS,
    LANGUAGES,
    MONEY,
    NOTES,
    PEOPLE,
    PLACES,
    ROOMS,
    SKIES,
    SONGS,
    TOPICS,
    coined,
    invented,
    person,
    place,
)

Draw = Callable[[Random, str], Any]


@dataclass(frozen=True)
class Parameter:
    """An argument: its possible names, its JSON type, its descriptions in both languages, and how to draw a value.

    Names stand apart by spaces, descriptions by bars.
    """

    names: str
    type: str
    text: dict[str, str]
    draw: Draw


@dataclass(frozen=True)
class Tool:
    """A tool before its names are chosen. `asks[lang]` are requests; one that lacks a slot leaves that argument out.

    `names` are verbs and nouns, "get query/weather forecast"; `text` holds descriptions, apart by bars.
    """

    names: str
    text: dict[str, str]
    parameters: dict[str, Parameter]
    asks: dict[str, list[str]]
    result: Callable[[Random, str, dict[str, Any]], dict[str, Any]]
    answers: dict[str, str]


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


CITY = Parameter("city location place town city_name where area region destination target_city", "string",
                 both("City|City name|The city|Name of the city|Location", "城市|城市名|城市名称|要查询的城市|地点"), place)
KNOWN = [
    Tool("get query fetch check show lookup/weather forecast current_weather weather_info weather_report", both("Get the weather|Get the current weather of a city|Weather forecast|Look up the weather", "查询天气|查询城市天气|获取天气预报|天气查询"),
         {"city": CITY, "days": Parameter("days num_days day_count n_days duration span", "integer", both("Days|Number of days", "天数|多少天"),
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
    Tool("get query fetch tell read/time current_time local_time clock world_time", both("Get the current time|Tell the time in a city|Local time of a city", "查询当前时间|查询城市时间|获取当地时间"), {"city": CITY},
         {"en": ["What time is it in {city}?", "Tell me the time in {city}.", "Current time in {city}?",
                 "What is the time in {city} now?"],
          "zh": ["{city}现在几点？", "现在{city}是几点？", "告诉我{city}的时间", "查一下{city}时间"]},
         lambda r, t, a: {"time": clock(r, t)}, both("It is {time} in {city}.", "{city}现在是{time}。")),
    Tool("run use do eval/calculator calculate compute evaluate math calc", both("Evaluate an expression|Calculate|A calculator", "计算算式|计算器|数学计算"),
         {"expression": Parameter("expression formula expr input problem equation math sum", "string", both("Expression|The expression|Formula", "算式|表达式|公式"), formula)},
         {"en": ["Calculate {expression}", "What is {expression}?", "Compute {expression}.",
                 "How much is {expression}?"],
          "zh": ["计算{expression}", "{expression}等于多少？", "算一下{expression}", "{expression}是多少？"]},
         lambda r, t, a: {"result": r.choice((r.randrange(-900, 9000), r.randrange(1, 9000) / 10))},
         both("{expression} = {result}", "{expression} = {result}")),
    Tool("do web online run/search web_search google find_pages internet_search", both("Search the web|Search the internet|Find web pages", "搜索网页|网络搜索|上网搜索"),
         {"query": Parameter("query q keywords keyword topic search_term words subject", "string", both("Query|Search words|What to look for", "关键词|搜索词|搜索内容"), one(TOPICS)),
          "limit": Parameter("limit count num_results max_results top n size", "integer", both("Number of results|How many results", "结果数|返回条数"),
                           lambda r, t: r.randrange(2, 30))},
         {"en": ["Search for {query}", "Look up {query}.", "Find something about {query}.",
                 "Search the web for {query}.",
                 "Find {limit} results about {query}.", "Search for {query}, {limit} results"],
          "zh": ["搜索{query}", "查一下{query}", "帮我搜{query}", "上网找{query}", "搜索{query}，要{limit}条",
                 "找{limit}条关于{query}的结果"]},
         lambda r, t, a: {"title": r.choice(TOPICS[t]) + " " + str(r.randrange(2000, 2026))},
         both("I found: {title}", "找到：{title}")),
    Tool("do get run/translate translate_text translator translation", both("Translate a text|Translate into another language", "翻译文本|翻译成另一种语言"),
         {"text": Parameter("text content sentence source_text input phrase words", "string", both("Text|The text", "文本|原文"), one(NOTES)),
          "language": Parameter("language target target_language lang to_language output_language into", "string", both("Target language|Language", "目标语言|语言"),
                                one(LANGUAGES, 0))},
         {"en": ["Translate \"{text}\" into {language}.", "How do you say \"{text}\" in {language}?",
                 "Put \"{text}\" into {language}."],
          "zh": ["把“{text}”翻译成{language}", "“{text}”用{language}怎么说？", "请将“{text}”译成{language}"]},
         lambda r, t, a: {"translation": f"{invented(r, 'en')} {invented(r, 'en').lower()}"},
         both("{translation}", "{translation}")),
    Tool("set add create make/reminder remind remind_me alarm", both("Set a reminder|Remind the user", "设置提醒|提醒用户"),
         {"task": Parameter("task text what content todo note thing", "string", both("What to do|Task", "事项|要做的事"), one(CHORES, 0)),
          "time": Parameter("time at when clock hour due remind_at", "string", both("Time|When", "时间|什么时候"), clock)},
         {"en": ["Remind me to {task} at {time}.", "At {time} I must {task}; remind me.",
                 "Set a reminder for {time}: {task}"],
          "zh": ["{time}提醒我{task}", "提醒我{time}{task}", "设个提醒，{time}{task}"]},
         lambda r, t, a: {"ok": True}, both("Done. I will remind you to {task} at {time}.",
                                            "好的，{time}提醒你{task}。")),
    Tool("convert change calc/currency exchange money currency_convert", both("Convert money|Exchange money|Convert a currency", "货币换算|兑换货币|汇率换算"),
         {"amount": Parameter("amount value sum quantity money number", "number", both("Amount|How much", "金额|数额"), amount),
          "source": Parameter("from source from_currency base have old_currency", "string", both("From|From this currency", "原货币|源货币"),
                           lambda r, t: r.choice(MONEY)),
          "target": Parameter("to target to_currency wanted new_currency into", "string", both("To|To this currency", "目标货币|新货币"), lambda r, t: r.choice(MONEY))},
         {"en": ["Convert {amount} {source} to {target}.", "How much is {amount} {source} in {target}?",
                 "{amount} {source} to {target}"],
          "zh": ["{amount} {source}换成{target}", "把{amount} {source}换算成{target}",
                 "{amount} {source}是多少{target}？"]},
         lambda r, t, a: {"result": r.randrange(10, 90000) / 10},
         both("{amount} {source} is {result} {target}.", "{amount} {source}等于{result} {target}。")),
    Tool("play start put_on/music song play track", both("Play a song|Play music", "播放歌曲|播放音乐"),
         {"song": Parameter("song title name track song_name music tune", "string", both("Song|Song title", "歌名|歌曲"), one(SONGS))},
         {"en": ["Play {song}.", "I want to hear {song}.", "Put on {song}, please."],
          "zh": ["播放{song}", "我想听{song}", "放一首{song}"]},
         lambda r, t, a: {"ok": True}, both("Now playing {song}.", "正在播放{song}。")),
    Tool("send write post/message text_message sms mail text_contact", both("Send a message|Send a text message", "发送消息|发消息"),
         {"to": Parameter("to recipient contact receiver person name friend", "string", both("Recipient|Who gets it", "收件人|接收人"), person),
          "text": Parameter("text message body content words note", "string", both("Message|The message", "消息内容|内容"), one(NOTES, 0))},
         {"en": ["Send {to} a message: {text}", "Write to {to}: {text}", "Message {to} that {text}."],
          "zh": ["给{to}发消息：{text}", "告诉{to}：{text}", "发给{to}：{text}"]},
         lambda r, t, a: {"sent": True}, both("I sent the message to {to}.", "已发给{to}。")),
    Tool("set switch control turn/light lamp light_state lights", both("Switch a light|Turn a light on or off", "开关灯|控制灯光"),
         {"room": Parameter("room place where location room_name area", "string", both("Room|Which room", "房间|哪个房间"), one(ROOMS)),
          "on": Parameter("on enabled state active power switch lit", "boolean", both("On or off|Whether it is on", "是否打开|开或关"), lambda r, t: r.random() < 0.5)},
         {"en": ["Turn {on} the light in the {room}.", "Switch the {room} light {on}.",
                 "Light {on} in the {room}, please."],
          "zh": ["{on}{room}的灯", "请{on}{room}灯", "把{room}的灯{on}"]},
         lambda r, t, a: {"ok": True}, both("The light in the {room} is now {on}.", "{room}的灯已经{on}。")),
    Tool("add put append/items shopping_list to_list to_cart goods", both("Add to the shopping list|Add items to the list", "加入购物清单|添加到清单"),
         {"items": Parameter("items goods things products list entries", "array", both("Items|Things to buy", "物品|要买的东西"), some(GOODS))},
         {"en": ["Add {items} to the shopping list.", "Put {items} on my list.", "I need to buy {items}."],
          "zh": ["把{items}加入购物清单", "购物清单加上{items}", "我要买{items}"]},
         lambda r, t, a: {"count": len(a["items"])}, both("Your list has {count} more items.",
                                                          "清单增加了{count}项。")),
    Tool("get compute find/average mean mean_value avg", both("Average of numbers|Mean of a list of numbers", "求平均数|计算平均值"),
         {"numbers": Parameter("numbers values data list samples xs", "array", both("Numbers|List of numbers", "数字|数字列表"),
                               lambda r, t: [r.randrange(100) for _ in range(r.randrange(2, 6))])},
         {"en": ["What is the average of {numbers}?", "Average {numbers}.", "Find the mean of {numbers}."],
          "zh": ["{numbers}的平均数是多少？", "求{numbers}的平均值", "算{numbers}的平均数"]},
         lambda r, t, a: {"result": r.randrange(1, 999) / 10}, both("The average is {result}.", "平均数是{result}。")),
    Tool("get find show/location where_am_i current_location position gps", both("Get the user's location|Where the user is", "获取用户位置|用户在哪里"), {},
         {"en": ["Where am I?", "What is my location?", "Where am I now?"],
          "zh": ["我在哪里？", "我现在在什么地方？", "我的位置是什么？"]},
         lambda r, t, a: {"city": place(r, t)}, both("You are in {city}.", "你在{city}。")),
    Tool("roll throw cast/dice roll die random_dice", both("Roll a die|Throw the dice", "掷骰子|扔骰子"), {},
         {"en": ["Roll a die.", "Throw the dice for me.", "Please roll the dice."],
          "zh": ["掷骰子", "帮我掷一次骰子", "扔个骰子"]},
         lambda r, t, a: {"value": r.randrange(1, 7)}, both("You rolled {value}.", "掷出了{value}。")),
    Tool("get show query/balance account_balance account money_left", both("Get the account balance|Show the balance", "查询余额|查询账户余额"), {},
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
    "string": [person, place, clock, one(TOPICS), one(DAYS, 0), one(COLOURS, 0), one(GOODS, 0.5), invented,
               lambda r, t: f"{r.choice('ABCDEFGH')}{r.randrange(1000)}"],
    "integer": [lambda r, t: r.randrange(1, 100), lambda r, t: r.randrange(1, 1000)],
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
    """Nouns and parameters of tools that only held-out questions show."""

    nouns: list[tuple[str, str]]
    parameters: list[Parameter]

    def words(self) -> set[str]:
        return {noun for noun, _ in self.nouns} | {p.names for p in self.parameters}


FEW_UNSEEN = Unseen(
    [("boat", "船"), ("lesson", "课时"), ("printer", "打印机"), ("gift", "礼物"), ("flight", "航班"), ("invoice", "发票")],
    [
        Parameter("street", "string", both("street", "街道"), person),
        Parameter("guests", "integer", both("guests", "客人"), lambda r, t: r.randrange(1, 100)),
        Parameter("discount", "number", both("discount", "折扣"), amount),
        Parameter("private", "boolean", both("private", "私人"), lambda r, t: r.random() < 0.5),
        Parameter("toppings", "array", both("toppings", "配料"), some(GOODS)),
    ],
)
MANY_UNSEEN = Unseen(
    [("harbor", "港口"), ("ladder", "梯子"), ("magnet", "磁铁"), ("orchid", "兰花"), ("pillow", "枕头"), ("rocket", "火箭"),
     ("saddle", "马鞍"), ("statue", "雕像"), ("tractor", "拖拉机"), ("umbrella", "雨伞"), ("vaccine", "疫苗"), ("wallet", "钱包"),
     ("windmill", "风车"), ("blanket", "毯子"), ("canoe", "独木舟"), ("drawer", "抽屉"), ("engine", "发动机"), ("guitar", "吉他"),
     ("hammer", "锤子"), ("blender", "搅拌机"), ("kettle", "水壶"), ("locker", "储物柜")],
    [Parameter(name, kind, both(name, chinese), draw) for kind, draw, pairs in (
        ("string", person, "passenger 乘客 district 区县 fabric 面料 mentor 导师 sponsor 赞助商 venue 场馆"),
        ("integer", lambda r, t: r.randrange(1, 100), "voltage 电压 altitude 海拔 workers 工人"),
        ("number", amount, "humidity 湿度 salary 薪水 mileage 里程 thickness 厚度"),
        ("boolean", lambda r, t: r.random() < 0.5, "digital 数字 waterproof 防水 refundable 可退款"),
        ("array", some(GOODS), "flavors 风味 ingredients 原料 sensors 传感器 chapters 章节"),
    ) for name, chinese in zip(pairs.split()[::2], pairs.split()[1::2], strict=True)],
)  # fmt: skip
UNSEEN = FEW_UNSEEN.words() | MANY_UNSEEN.words()
YES = {"en": ("no", "yes"), "zh": ("否", "是")}


# English words, whose beginnings and ends make new ones: most pieces that a new word may be spelled with occur in some.
ENGLISH = sorted({
    word.lower() for words in (GOODS, JOBS, COLOURS, TOPICS, CHORES, EVENTS, NOTES, ROOMS, SONGS, LANGUAGES, PEOPLE, PLACES)
    for phrase in words["en"] for word in phrase.split() if len(word) > 3
} | {word for words in WORDS.values() for word in words.split()[::2]} | {noun for noun, _ in NOUNS})  # fmt: skip


def strange_word(rng: Random) -> tuple[str, str]:
    """A word and its Chinese, which belong together nowhere else; never one of the unseen."""
    if rng.random() < 0.3:
        at = rng.randrange(24)
        english, chinese = rng.choice([list(words.values()) for words in (GOODS, JOBS, COLOURS)])
        return english[at % len(english)], chinese[at % len(chinese)]
    letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(3, 8)))
    first, second = rng.choice(ENGLISH), rng.choice(ENGLISH)
    blend = first[: rng.randrange(2, 6)] + second[-rng.randrange(2, 6) :]
    word = rng.choice((letters, invented(rng, "en").lower(), blend, *(coined(rng) for _ in range(5))))
    ending = rng.choice(("", "", "", "", "_name", "_id", "_list", f"_{coined(rng)}"))
    if UNSEEN & {word, ending[1:]}:
        return strange_word(rng)
    return word + ending, invented(rng, "zh")


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
    form = rng.randrange(3)
    asks = {}
    heads = (("en", [f"{verb.capitalize()} the {SEAM}{noun}{SEAM}", f"Please {verb} the {SEAM}{noun}{SEAM}"]),
             ("zh", [f"{verb_zh}{SEAM}{noun_zh}{SEAM}", f"请{verb_zh}{SEAM}{noun_zh}{SEAM}"]))  # fmt: skip
    for tongue, head in heads:
        link, comma, opening, stop = {
            "en": [(" ", ", ", ": ", "."), (" is ", "; ", ". ", "."), (" ", " and ", " with ", "")],
            "zh": [("是", "，", "，", ""), ("", "，", "：", "。"), ("为", "、", "，", "")],
        }[tongue][form]
        told = comma.join(f"{SEAM}{p.text[tongue]}{SEAM}{link}{{{k}}}" for k, p in parameters.items())
        asks[tongue] = [h + (opening + told if told else "") + stop for h in head]
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
        names = {key: rng.choice(p.names.split()) for key, p in tool.parameters.items()}
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
