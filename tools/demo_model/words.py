"""The vocabulary of the training data: people, places, things, each in English and Chinese. Plain lists, no grammar."""

# ruff: noqa: E501, SIM905  (Chinese counts double; the tables read best as they are)

import json
import re
from dataclasses import dataclass
from pathlib import Path
from random import Random


@dataclass(frozen=True)
class City:
    """One row of cities.txt. Every field but the last two is a pair {"en": …, "zh": …}."""

    name: dict[str, str]
    country: dict[str, str]
    water: dict[str, str]
    sight: dict[str, str]
    fame: dict[str, str]
    capital: bool
    millions: int  # more than 10, more than 5, more than 1, or 0: fewer than one million people


def read_cities() -> list[City]:
    """The table beside this file, in its own order."""
    rows = (Path(__file__).parent / "cities.txt").read_text(encoding="utf-8").splitlines()
    cities = []
    for row in rows:
        if row.startswith("#"):
            continue
        cells = row.split("|")
        pairs = [dict(zip(("en", "zh"), cells[i : i + 2])) for i in (0, 2, 5, 7, 9)]
        cities.append(City(*pairs, capital=cells[4] == "yes", millions=int(cells[11])))
    return cities


CITIES = read_cities()

PEOPLE = {
    "en": "Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Leo Maria Nina Oscar Paul Rosa Sam Tina Victor Wendy "
    "Adam Bella Carlos Diana Eric Fiona George Helen Ivan Julia Kevin Laura Mark Nora Oliver Peter Rita Simon Tom".split(),
    "zh": [
        a + b
        for a in "王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗"
        for b in "明华芳 丽 军 磊 静 洋 强 娜 杰 婷 涛 敏 鹏 雪 晨 宇 欣 怡".replace(" ", "")
    ]
    + ["小明", "小红", "小李", "小王", "小张", "小美", "阿强", "阿芳"],
}
PLACES = {  # towns that the model is told nothing about
    "en": "Leeds Bristol Ghent Bergen Tampere Graz Lucerne Bologna Verona Turin Malaga Granada Braga Nantes Lille Bremen Dresden "
    "Leipzig Gdansk Brno Split Plovdiv Izmir Haifa Muscat Jaipur Pune Hue Cebu Busan Sapporo Nagoya Perth Hobart Quito "
    "Cusco Denver Austin Dallas Calgary Quebec Accra Dakar Tunis".split(),
    "zh": "宁波 无锡 常州 温州 绍兴 嘉兴 珠海 佛山 东莞 惠州 中山 泉州 漳州 赣州 宜昌 襄阳 岳阳 株洲 遵义 大理 丽江 宝鸡 银川 西宁 "
    "海口 南宁 北海 烟台 威海 潍坊 徐州 保定 大同 包头 吉林 长春 利兹 布里斯托 格拉茨 博洛尼亚 德累斯顿 名古屋 札幌 珀斯 达拉斯".split(),
}
JOBS = {
    "en": "teacher doctor nurse driver cook lawyer painter farmer singer writer engineer pilot baker waiter judge dentist".split(),
    "zh": "老师 医生 护士 司机 厨师 律师 画家 农民 歌手 作家 工程师 飞行员 面包师 服务员 法官 牙医".split(),
}
GOODS = {
    "en": "apples pears milk bread eggs butter cheese rice tea coffee paper pens books chairs lamps candles shoes socks hats "
    "shirts tomatoes onions carrots potatoes lemons honey sugar salt olives corn ham fish".split(),
    "zh": "苹果 梨 牛奶 面包 鸡蛋 黄油 奶酪 大米 茶叶 咖啡 纸 钢笔 书 椅子 台灯 蜡烛 鞋子 袜子 帽子 衬衫 西红柿 洋葱 胡萝卜 土豆 "
    "柠檬 蜂蜜 白糖 盐 橄榄 玉米 火腿 鱼".split(),
}
EVENTS = {
    "en": "team meeting|book club|chess final|piano lesson|birthday party|school concert|art show|yoga class|film night|"
    "garden tour|science fair|job interview".split("|"),
    "zh": "组会 读书会 象棋决赛 钢琴课 生日聚会 学校音乐会 画展 瑜伽课 电影之夜 花园参观 科学展 面试".split(),
}
DAYS = {
    "en": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday tomorrow tonight".split(),
    "zh": "周一 周二 周三 周四 周五 周六 周日 明天 今晚".split(),
}
TOPICS = {
    "en": "solar power|black holes|green tea|jazz history|deep sea fish|electric cars|healthy food|cheap flights|world news|"
    "wooden bridges|football results|machine learning|old maps|rain forests|space travel|stone age tools|winter coats|"
    "chess openings|paper birds|bird songs".split("|"),
    "zh": "太阳能 黑洞 绿茶 爵士乐历史 深海鱼 电动汽车 健康饮食 便宜机票 世界新闻 木桥 足球比分 机器学习 老地图 热带雨林 太空旅行 "
    "石器时代 冬季外套 象棋开局 折纸 鸟鸣".split(),
}
CHORES = {
    "en": "call mum|buy milk|water the plants|pay the rent|walk the dog|feed the cat|send the letter|book a room|clean the car|"
    "read the report|close the windows|take the medicine".split("|"),
    "zh": "给妈妈打电话 买牛奶 浇花 交房租 遛狗 喂猫 寄信 订房间 洗车 看报告 关窗户 吃药".split(),
}
NOTES = {
    "en": "I am late|dinner is ready|see you soon|the train is full|happy birthday|call me back|the door is open|"
    "good luck today|I am at home|thank you".split("|"),
    "zh": "我迟到了 饭做好了 一会儿见 火车满了 生日快乐 给我回电话 门开着 今天加油 我在家 谢谢你".split(),
}
SONGS = {
    "en": "Blue Moon|Yellow River|Summer Rain|Silent Night|Morning Light|Old Town Road|Golden Days|City of Stars|"
    "Paper Moon|Northern Wind|Sweet Home|Long Way Down".split("|"),
    "zh": "茉莉花 月亮代表我的心 夏天的雨 平安夜 晨光 故乡的云 黄金岁月 星光之城 纸月亮 北风 甜蜜的家 小城故事".split(),
}
ROOMS = {
    "en": "kitchen|bedroom|living room|bathroom|study|hall|garage|garden".split("|"),
    "zh": "厨房 卧室 客厅 浴室 书房 走廊 车库 花园".split(),
}
LANGUAGES = {
    "en": "English Chinese French German Spanish Japanese Italian Russian Korean Arabic".split(),
    "zh": "英语 中文 法语 德语 西班牙语 日语 意大利语 俄语 韩语 阿拉伯语".split(),
}
SKIES = {
    "en": "sunny cloudy rainy snowy windy foggy".split(),
    "zh": "晴 多云 有雨 有雪 有风 有雾".split(),
}
COLOURS = {
    "en": "red blue green white black yellow grey brown".split(),
    "zh": "红色 蓝色 绿色 白色 黑色 黄色 灰色 棕色".split(),
}
MONEY = "USD EUR CNY JPY GBP KRW CHF CAD AUD INR".split()

SYLLABLES = (
    "ba be bo da de do fa fe fo ga go ka ke ko la le li lo lu ma me mi mo na ne ni no pa pe po ra re ri ro ru sa se so "
    "ta te ti to va ve vi vo za ze zo an en in on ar er or al el il"
).split()
CHARACTERS = "天地人和风云山水花木金石火土日月星光春夏秋冬东西南北中大小长江河海湖岛村城门路桥楼安平康宁永兴新文武德福林松竹梅兰荷龙凤马牛羊鱼鸟白青红紫玉宝清明远方古来"


def invented(rng: Random, lang: str) -> str:
    """A name that nobody has, so that copying it is the only way to get it right."""
    if lang == "zh":
        return "".join(rng.choice(CHARACTERS) for _ in range(rng.choice((2, 2, 3))))
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 3, 3)))).capitalize()


_TOKENIZER = Path(__file__).parents[2] / "glimmer" / "demo" / "tokenizer.json"
PIECES = sorted(token for token in json.loads(_TOKENIZER.read_text(encoding="utf-8"))["model"]["vocab"]
                if re.fullmatch("[a-z]+", token))  # fmt: skip


# The 3,755 characters that GB 2312 counts as common.
COMMON = [bytes([high, low]).decode("gb2312") for high in range(0xB0, 0xD8) for low in range(0xA1, 0xFF)
          if (high, low) < (0xD7, 0xFA)]  # fmt: skip


def coined(rng: Random, lang: str = "en") -> str:
    """One to four tokens of the shipped tokenizer, every one as often as any other: no word is spelled without them.

    A token that the model never had to copy is one that it cannot copy, and a new word is made of such tokens. In
    Chinese one to three common characters, most of which are two or three tokens.
    """
    if lang == "zh":
        return "".join(rng.choices(COMMON, k=rng.choice((1, 2, 2, 2, 3))))
    return "".join(rng.choices(PIECES, k=rng.choice((1, 2, 2, 3, 3, 4))))


def person(rng: Random, lang: str) -> str:
    return invented(rng, lang) if rng.random() < 0.3 else rng.choice(PEOPLE[lang])


def place(rng: Random, lang: str) -> str:
    """A city from the table, another town, or an invented one."""
    kind = rng.random()
    if kind < 0.55:
        return rng.choice(CITIES).name[lang]
    return rng.choice(PLACES[lang]) if kind < 0.75 else invented(rng, lang)
