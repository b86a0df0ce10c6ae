"""The known tools: their names, their parameters, what is said when they are needed, and what they answer. A table.

Every tool goes by many names and is asked for in many ways, and most values have no end: whoever learns this table by
heart has learnt to read schemas. Not here: made-up tools, and how a tool, a request and a call are drawn (tooling.py).
"""

# ruff: noqa: E501  (Chinese counts double; the tables read best as they are)

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from phrases import phrase
from words import DAYS, GOODS, MONEY, SKIES, invented, person, place

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


def both(en: str, zh: str) -> dict[str, str]:
    return {"en": en, "zh": zh}


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


def any_of(kind: str, new: float = 0.1) -> Draw:
    """A phrase of the kind, or now and then an invented name."""
    return lambda rng, lang: invented(rng, lang) if rng.random() < new else phrase(rng, lang, kind)


def amount(rng: Random, lang: str) -> float | int:
    return rng.choice((rng.randrange(1, 2000), rng.randrange(10, 2000) / 10))


def number(least: int, end: int) -> Draw:
    return lambda rng, lang: rng.randrange(least, end)


def done(rng: Random, lang: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"ok": True}


CITY = Parameter(
    "city location place town city_name where area region destination target_city",
    "string",
    both("City|City name|The city|Name of the city|Location", "城市|城市名|城市名称|要查询的城市|地点"),
    place,
)
ROOM = Parameter(
    "room place where location room_name area", "string", both("Room|Which room", "房间|哪个房间"), any_of("room")
)
KNOWN = [
    Tool("get query fetch check show lookup/weather forecast current_weather weather_info weather_report",
         both("Get the weather|Get the current weather of a city|Weather forecast|Look up the weather", "查询天气|查询城市天气|获取天气预报|天气查询"),
         {"city": CITY, "days": Parameter("days num_days day_count n_days duration span", "integer", both("Days|Number of days", "天数|多少天"), number(2, 15))},
         {"en": ["What is the weather in {city}?", "How is the weather in {city} today?", "Weather in {city}?", "Will it rain in {city}?", "Tell me the weather in {city}.",
                 "What's the weather like in {city}?", "Is it cold in {city}?", "Do I need a coat in {city}?", "How warm is it in {city}?", "I travel to {city}: what is the weather there?",
                 "Check the weather in {city}.", "Is the sun shining in {city}?",
                 "Weather in {city} for {days} days", "What will the weather be in {city} over the next {days} days?", "I want the weather of {city} for the coming {days} days.",
                 "How will the weather be in {city} in the next {days} days?"],
          "zh": ["{city}天气怎么样？", "查一下{city}的天气", "{city}今天会下雨吗？", "今天{city}的天气如何？", "告诉我{city}天气", "{city}的天气", "{city}冷不冷？", "去{city}要带外套吗？",
                 "{city}现在热吗？", "我要去{city}，那里天气好吗？", "看看{city}的天气", "{city}出太阳了吗？",
                 "{city}未来{days}天的天气", "查询{city}{days}天的天气", "我想知道{city}接下来{days}天的天气", "{city}这{days}天天气怎么样？"]},
         lambda r, t, a: {"temperature": r.randrange(-9, 39), "weather": r.choice(SKIES[t])},
         both("It is {weather} in {city}, {temperature} degrees.", "{city}{weather}，{temperature}度。")),
    Tool("get query fetch tell read/time current_time local_time clock world_time", both("Get the current time|Tell the time in a city|Local time of a city", "查询当前时间|查询城市时间|获取当地时间"),
         {"city": CITY},
         {"en": ["What time is it in {city}?", "Tell me the time in {city}.", "Current time in {city}?", "What is the time in {city} now?", "How late is it in {city}?", "Which time do they have in {city}?",
                 "Look up the time in {city}.", "I call somebody in {city}: what time is it there?", "Is it night in {city}?", "Time in {city}?"],
          "zh": ["{city}现在几点？", "现在{city}是几点？", "告诉我{city}的时间", "查一下{city}时间", "{city}几点了？", "我要打电话到{city}，那边几点？", "{city}当地时间是多少？", "{city}现在是晚上吗？",
                 "看看{city}的时间", "{city}那边现在什么时间？"]},
         lambda r, t, a: {"time": clock(r, t)}, both("It is {time} in {city}.", "{city}现在是{time}。")),
    Tool("run use do eval/calculator calculate compute evaluate math calc", both("Evaluate an expression|Calculate|A calculator", "计算算式|计算器|数学计算"),
         {"expression": Parameter("expression formula expr input problem equation math sum", "string", both("Expression|The expression|Formula", "算式|表达式|公式"), formula)},
         {"en": ["Calculate {expression}", "What is {expression}?", "Compute {expression}.", "How much is {expression}?", "Work out {expression}.", "{expression} = ?", "I need the result of {expression}.",
                 "Use the calculator for {expression}.", "Tell me what {expression} is.", "Evaluate {expression}"],
          "zh": ["计算{expression}", "{expression}等于多少？", "算一下{expression}", "{expression}是多少？", "{expression}=？", "用计算器算{expression}", "帮我算{expression}", "我想知道{expression}的结果",
                 "求{expression}", "{expression}的结果是什么？"]},
         lambda r, t, a: {"result": r.choice((r.randrange(-900, 9000), r.randrange(1, 9000) / 10))},
         both("{expression} = {result}", "{expression} = {result}")),
    Tool("do web online run/search web_search google find_pages internet_search", both("Search the web|Search the internet|Find web pages", "搜索网页|网络搜索|上网搜索"),
         {"query": Parameter("query q keywords keyword topic search_term words subject", "string", both("Query|Search words|What to look for", "关键词|搜索词|搜索内容"), any_of("topic")),
          "limit": Parameter("limit count num_results max_results top n size", "integer", both("Number of results|How many results", "结果数|返回条数"), number(2, 30))},
         {"en": ["Search for {query}", "Look up {query}.", "Find something about {query}.", "Search the web for {query}.", "What does the internet say about {query}?", "I want to read about {query}.",
                 "Google {query}.", "Are there pages about {query}?", "Find pages on {query}.", "Do a web search: {query}",
                 "Find {limit} results about {query}.", "Search for {query}, {limit} results", "Give me {limit} pages about {query}.", "Look up {query} and show {limit} results."],
          "zh": ["搜索{query}", "查一下{query}", "帮我搜{query}", "上网找{query}", "网上怎么说{query}？", "我想看看关于{query}的内容", "搜一搜{query}", "有没有{query}的网页？", "找找{query}的资料",
                 "搜索{query}，要{limit}条", "找{limit}条关于{query}的结果", "给我{limit}个{query}的网页", "查{query}，显示{limit}条"]},
         lambda r, t, a: {"title": phrase(r, t, "topic") + " " + str(r.randrange(2000, 2026))},
         both("I found: {title}", "找到：{title}")),
    Tool("do get run/translate translate_text translator translation", both("Translate a text|Translate into another language", "翻译文本|翻译成另一种语言"),
         {"text": Parameter("text content sentence source_text input phrase words", "string", both("Text|The text", "文本|原文"), any_of("note")),
          "language": Parameter("language target target_language lang to_language output_language into", "string", both("Target language|Language", "目标语言|语言"), any_of("language"))},
         {"en": ["Translate \"{text}\" into {language}.", "How do you say \"{text}\" in {language}?", "Put \"{text}\" into {language}.", "I need \"{text}\" in {language}.", "What is \"{text}\" in {language}?",
                 "Translate into {language}: {text}", "Say this in {language}: {text}", "Give me the {language} for \"{text}\".", "Write \"{text}\" in {language}, please."],
          "zh": ["把“{text}”翻译成{language}", "“{text}”用{language}怎么说？", "请将“{text}”译成{language}", "翻译成{language}：{text}", "用{language}说：{text}", "我要“{text}”的{language}", "“{text}”的{language}是什么？",
                 "请用{language}写“{text}”"]},
         lambda r, t, a: {"translation": f"{invented(r, 'en')} {invented(r, 'en').lower()}"},
         both("{translation}", "{translation}")),
    Tool("set add create make/reminder remind remind_me alarm", both("Set a reminder|Remind the user", "设置提醒|提醒用户"),
         {"task": Parameter("task text what content todo note thing", "string", both("What to do|Task", "事项|要做的事"), any_of("chore", 0.05)),
          "time": Parameter("time at when clock hour due remind_at", "string", both("Time|When", "时间|什么时候"), clock)},
         {"en": ["Remind me to {task} at {time}.", "At {time} I must {task}; remind me.", "Set a reminder for {time}: {task}", "Don't let me forget to {task} at {time}.", "I have to {task} at {time}, remind me please.",
                 "Reminder: {task}, {time}", "{time}: {task}. Remind me.", "Wake me at {time} to {task}.", "Make a reminder to {task} at {time}.", "Please remind me at {time} to {task}."],
          "zh": ["{time}提醒我{task}", "提醒我{time}{task}", "设个提醒，{time}{task}", "别让我忘了{time}{task}", "我{time}要{task}，提醒我", "提醒：{time}，{task}", "到{time}叫我{task}", "请在{time}提醒我{task}",
                 "{time}要{task}，记得提醒"]},
         done, both("Done. I will remind you to {task} at {time}.", "好的，{time}提醒你{task}。")),
    Tool("convert change calc/currency exchange money currency_convert", both("Convert money|Exchange money|Convert a currency", "货币换算|兑换货币|汇率换算"),
         {"amount": Parameter("amount value sum quantity money number", "number", both("Amount|How much", "金额|数额"), amount),
          "source": Parameter("from source from_currency base have old_currency", "string", both("From|From this currency", "原货币|源货币"), lambda r, t: r.choice(MONEY)),
          "target": Parameter("to target to_currency wanted new_currency into", "string", both("To|To this currency", "目标货币|新货币"), lambda r, t: r.choice(MONEY))},
         {"en": ["Convert {amount} {source} to {target}.", "How much is {amount} {source} in {target}?", "{amount} {source} to {target}", "I have {amount} {source}; what is that in {target}?",
                 "Change {amount} {source} into {target}.", "What do I get in {target} for {amount} {source}?", "Exchange {amount} {source} for {target}.", "How many {target} are {amount} {source}?"],
          "zh": ["{amount} {source}换成{target}", "把{amount} {source}换算成{target}", "{amount} {source}是多少{target}？", "我有{amount} {source}，合多少{target}？", "{amount} {source}能换多少{target}？",
                 "将{amount} {source}兑换为{target}", "{amount} {source}等于多少{target}？"]},
         lambda r, t, a: {"result": r.randrange(10, 90000) / 10},
         both("{amount} {source} is {result} {target}.", "{amount} {source}等于{result} {target}。")),
    Tool("play start put_on/music song play track", both("Play a song|Play music", "播放歌曲|播放音乐"),
         {"song": Parameter("song title name track song_name music tune", "string", both("Song|Song title", "歌名|歌曲"), any_of("song"))},
         {"en": ["Play {song}.", "I want to hear {song}.", "Put on {song}, please.", "Start {song}.", "Can you play {song}?", "Let me listen to {song}.", "Music: {song}", "I am in the mood for {song}.", "Play the song {song}."],
          "zh": ["播放{song}", "我想听{song}", "放一首{song}", "来一首{song}", "能放{song}吗？", "让我听听{song}", "放歌：{song}", "听{song}", "请播放歌曲{song}"]},
         done, both("Now playing {song}.", "正在播放{song}。")),
    Tool("send write post/message text_message sms mail text_contact", both("Send a message|Send a text message", "发送消息|发消息"),
         {"to": Parameter("to recipient contact receiver person name friend", "string", both("Recipient|Who gets it", "收件人|接收人"), person),
          "text": Parameter("text message body content words note", "string", both("Message|The message", "消息内容|内容"), any_of("note", 0.05))},
         {"en": ["Send {to} a message: {text}", "Write to {to}: {text}", "Message {to} that {text}.", "Tell {to}: {text}", "Let {to} know that {text}.", "Text {to}: {text}", "Send \"{text}\" to {to}.",
                 "A message for {to}: {text}", "{to} should know: {text}"],
          "zh": ["给{to}发消息：{text}", "告诉{to}：{text}", "发给{to}：{text}", "转告{to}，{text}", "把“{text}”发给{to}", "给{to}的消息：{text}", "让{to}知道：{text}", "写信给{to}：{text}"]},
         lambda r, t, a: {"sent": True}, both("I sent the message to {to}.", "已发给{to}。")),
    Tool("set switch control turn/light lamp light_state lights", both("Switch a light|Turn a light on or off", "开关灯|控制灯光"),
         {"room": ROOM,
          "on": Parameter("on enabled state active power switch lit", "boolean", both("On or off|Whether it is on", "是否打开|开或关"), lambda r, t: r.random() < 0.5)},
         {"en": ["Turn {on} the light in the {room}.", "Switch the {room} light {on}.", "Light {on} in the {room}, please.", "{room}: light {on}", "The light in the {room} should be {on}.",
                 "Turn the lights of the {room} {on}.", "Lamp in the {room} {on}.", "Please switch {on} the lamp in the {room}."],
          "zh": ["{on}{room}的灯", "请{on}{room}灯", "把{room}的灯{on}", "{room}灯，{on}", "{room}的灯要{on}", "帮我{on}{room}的灯", "将{room}灯{on}"]},
         done, both("The light in the {room} is now {on}.", "{room}的灯已经{on}。")),
    Tool("add put append/items shopping_list to_list to_cart goods", both("Add to the shopping list|Add items to the list", "加入购物清单|添加到清单"),
         {"items": Parameter("items goods things products list entries", "array", both("Items|Things to buy", "物品|要买的东西"), some(GOODS))},
         {"en": ["Add {items} to the shopping list.", "Put {items} on my list.", "I need to buy {items}.", "We are out of {items}.", "Shopping list: {items}", "Write {items} on the list.", "I want to get {items} at the shop.",
                 "Note {items} for the next shopping trip."],
          "zh": ["把{items}加入购物清单", "购物清单加上{items}", "我要买{items}", "家里没有{items}了", "购物清单：{items}", "清单上写{items}", "下次去商店买{items}", "记下要买的{items}"]},
         lambda r, t, a: {"count": len(a["items"])}, both("Your list has {count} more items.", "清单增加了{count}项。")),
    Tool("get compute find/average mean mean_value avg", both("Average of numbers|Mean of a list of numbers", "求平均数|计算平均值"),
         {"numbers": Parameter("numbers values data list samples xs", "array", both("Numbers|List of numbers", "数字|数字列表"), lambda r, t: [r.randrange(100) for _ in range(r.randrange(2, 6))])},
         {"en": ["What is the average of {numbers}?", "Average {numbers}.", "Find the mean of {numbers}.", "Mean of {numbers}?", "I have {numbers}; what is their average?", "Take the average: {numbers}",
                 "How large are {numbers} on average?"],
          "zh": ["{numbers}的平均数是多少？", "求{numbers}的平均值", "算{numbers}的平均数", "{numbers}平均是多少？", "我有{numbers}，平均值是什么？", "求平均：{numbers}", "取{numbers}的平均"]},
         lambda r, t, a: {"result": r.randrange(1, 999) / 10}, both("The average is {result}.", "平均数是{result}。")),
    Tool("set start run/timer countdown start_timer stopwatch", both("Start a timer|Count down some minutes", "开始计时|倒计时"),
         {"minutes": Parameter("minutes length mins duration amount time span", "integer", both("Minutes|How long, in minutes", "分钟|多少分钟"), number(1, 120)),
          "label": Parameter("label name title text purpose what", "string", both("Label|What it is for", "标签|用途"), any_of("chore", 0.1))},
         {"en": ["Set a timer for {minutes} minutes.", "Count down {minutes} minutes.", "{minutes} minutes, starting now.", "Timer: {minutes} minutes", "Tell me when {minutes} minutes are over.", "Give me {minutes} minutes.",
                 "Set a timer of {minutes} minutes to {label}.", "I {label} in {minutes} minutes: start the timer.", "{minutes} minutes on the timer, then {label}."],
          "zh": ["计时{minutes}分钟", "{minutes}分钟倒计时", "定个{minutes}分钟的计时器", "{minutes}分钟后叫我", "开始计时，{minutes}分钟", "给我{minutes}分钟",
                 "定{minutes}分钟计时，用来{label}", "计时{minutes}分钟，然后{label}", "{minutes}分钟后{label}，请计时"]},
         done, both("The timer runs for {minutes} minutes.", "计时{minutes}分钟开始。")),
    Tool("get look_up find/definition dictionary meaning define word_meaning", both("Look up a word|Meaning of a word", "查词典|查询词义"),
         {"word": Parameter("word term entry text vocabulary expression name", "string", both("Word|The word", "词|要查的词"), any_of("word", 0.3))},
         {"en": ["What does {word} mean?", "Define {word}.", "Look {word} up in the dictionary.", "I don't know the word {word}.", "The meaning of {word}?", "What is meant by {word}?", "Explain the word {word}."],
          "zh": ["{word}是什么意思？", "查词典：{word}", "解释一下{word}这个词", "我不懂{word}这个词", "{word}的意思？", "{word}怎么解释？"]},
         lambda r, t, a: {"meaning": phrase(r, t, "topic")}, both("{word}: {meaning}", "{word}：{meaning}")),
    Tool("get read fetch show/news headlines latest_news news_feed", both("Read the news|Latest headlines on a subject", "看新闻|查询最新新闻"),
         {"subject": Parameter("subject topic about category query theme area", "string", both("Subject|What about", "主题|哪方面"), any_of("headline", 0.2))},
         {"en": ["What is new about {subject}?", "News about {subject}?", "Read me the news on {subject}.", "Any headlines about {subject}?", "What happened with {subject}?", "Show the latest on {subject}."],
          "zh": ["{subject}有什么新闻？", "看看{subject}的新闻", "读一下关于{subject}的新闻", "{subject}方面有什么消息？", "最新的{subject}消息", "有{subject}的头条吗？"]},
         lambda r, t, a: {"headline": phrase(r, t, "topic")}, both("News: {headline}", "新闻：{headline}")),
    Tool("add create plan put/calendar calendar_entry appointment schedule agenda", both("Add to the calendar|Make an appointment", "添加日程|安排日程"),
         {"what": Parameter("what title event name subject entry text", "string", both("What|Title of the entry", "内容|日程标题"), any_of("chore", 0.1)),
          "day": Parameter("day date when on_day weekday", "string", both("Day|Which day", "日期|哪天"), one(DAYS, 0)),
          "time": Parameter("time at hour start begins_at from", "string", both("Time|Start", "时间|开始时间"), clock)},
         {"en": ["Put it in my calendar: {what}, {day} at {time}", "{day} at {time} I want to {what}; note it.", "Appointment {day}, {time}: {what}", "Plan for {day} at {time}: {what}", "Add to my agenda: {what} ({day}, {time})",
                 "Schedule {what} for {day} at {time}."],
          "zh": ["日程：{day}{time}{what}", "{day}{time}我要{what}，记到日历里", "安排{day}{time}{what}", "日历加一项：{what}，{day}，{time}", "{day}的{time}{what}，加入日程"]},
         done, both("It is in your calendar: {what}.", "已加入日程：{what}。")),
    Tool("set change adjust/volume sound loudness audio_level", both("Set the volume|Change how loud it is", "调节音量|设置音量"),
         {"level": Parameter("level volume value percent amount loudness to", "integer", both("Level|0 to 100", "音量|0到100"), number(0, 101))},
         {"en": ["Volume {level}", "Set the volume to {level}.", "Make it {level} percent loud.", "Turn the sound to {level}.", "I want the volume at {level}.", "Sound level {level}, please."],
          "zh": ["音量{level}", "音量调到{level}", "把声音设为{level}", "声音调成{level}", "我要音量{level}", "请将音量改为{level}"]},
         done, both("The volume is {level}.", "音量是{level}。")),
    Tool("find get lookup show/contact phone_number phone_book address_book", both("Find a phone number|Look a person up", "查电话号码|查找联系人"),
         {"who": Parameter("who name person contact_name query full_name", "string", both("Name|Whose number", "姓名|谁的号码"), person)},
         {"en": ["What is the phone number of {who}?", "Look up {who} in my contacts.", "How can I reach {who}?", "{who}'s number?", "I want to call {who}: which number?", "Find the number of {who}."],
          "zh": ["{who}的电话是多少？", "查{who}的号码", "怎么联系{who}？", "在通讯录里找{who}", "我要打给{who}，号码是什么？", "{who}的手机号？"]},
         lambda r, t, a: {"number": str(r.randrange(10**6, 10**7))}, both("The number of {who} is {number}.", "{who}的号码是{number}。")),
    Tool("get plan find show/route directions way navigation path", both("Find the way|Plan a route", "查询路线|规划路线"),
         {"start": Parameter("start origin from_place departure begin source", "string", both("Start|Where from", "起点|从哪里"), place),
          "goal": Parameter("goal end to_place arrival finish dest", "string", both("Goal|Where to", "终点|到哪里"), place)},
         {"en": ["How do I get from {start} to {goal}?", "The way from {start} to {goal}?", "Route from {start} to {goal}", "I am in {start} and want to go to {goal}.", "Take me to {goal} from {start}.",
                 "Plan my trip to {goal}, I begin in {start}.", "How far is {goal} from {start}?"],
          "zh": ["从{start}到{goal}怎么走？", "{start}到{goal}的路线", "我在{start}，想去{goal}", "规划{start}去{goal}的路", "怎么从{start}去{goal}？", "{start}离{goal}多远？"]},
         lambda r, t, a: {"km": r.randrange(2, 3000)}, both("From {start} to {goal} it is {km} km.", "{start}到{goal}有{km}公里。")),
    Tool("set change control/temperature heating thermostat room_temperature", both("Set the heating|Temperature of a room", "设置暖气|调节房间温度"),
         {"room": ROOM, "degrees": Parameter("degrees temperature value celsius target heat", "number", both("Degrees|How warm", "度数|多少度"), lambda r, t: r.randrange(20, 60) / 2)},
         {"en": ["Set the {room} to {degrees} degrees.", "Make it {degrees} degrees in the {room}.", "Heat the {room} to {degrees} degrees.", "I want {degrees} degrees in the {room}.", "{room}: {degrees} degrees"],
          "zh": ["{room}调到{degrees}度", "把{room}的温度设为{degrees}度", "{room}要{degrees}度", "让{room}升到{degrees}度", "{room}温度{degrees}度"]},
         done, both("The {room} will have {degrees} degrees.", "{room}将是{degrees}度。")),
    Tool("get find show/location where_am_i current_location position gps", both("Get the user's location|Where the user is", "获取用户位置|用户在哪里"), {},
         {"en": ["Where am I?", "What is my location?", "Where am I now?", "Which place is this?", "I am lost: where am I?", "Find my position."],
          "zh": ["我在哪里？", "我现在在什么地方？", "我的位置是什么？", "这是哪儿？", "我迷路了，我在哪里？", "定位我"]},
         lambda r, t, a: {"city": place(r, t)}, both("You are in {city}.", "你在{city}。")),
    Tool("roll throw cast/dice roll die random_dice", both("Roll a die|Throw the dice", "掷骰子|扔骰子"), {},
         {"en": ["Roll a die.", "Throw the dice for me.", "Please roll the dice.", "Dice, please.", "Let the dice decide.", "Roll for me."],
          "zh": ["掷骰子", "帮我掷一次骰子", "扔个骰子", "骰子来一次", "请掷骰子", "让骰子决定"]},
         lambda r, t, a: {"value": r.randrange(1, 7)}, both("You rolled {value}.", "掷出了{value}。")),
    Tool("get show query/balance account_balance account money_left", both("Get the account balance|Show the balance", "查询余额|查询账户余额"), {},
         {"en": ["What is my balance?", "How much money do I have?", "Show my balance.", "Am I rich?", "How much is left in my account?", "My balance, please."],
          "zh": ["我的余额是多少？", "我还有多少钱？", "查余额", "账户里还剩多少？", "看看我的余额", "我有多少钱？"]},
         lambda r, t, a: {"balance": amount(r, t)}, both("Your balance is {balance}.", "余额是{balance}。")),
]  # fmt: skip
