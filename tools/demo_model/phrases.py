"""What requests are about, without end: chores, notes, topics, songs and rooms, put together from smaller parts.

With a dozen chores to ask for, a model learns the requests by heart, and which parameter each of them fills; so a value
is drawn from thousands. `phrase` follows a small grammar: <part> is a phrase of that kind, or a name. Not here: sentences.
"""

# ruff: noqa: E501, SIM905  (Chinese counts double; the tables read best as they are)

import re
from random import Random

from words import CHORES, DAYS, GOODS, LANGUAGES, NOTES, PEOPLE, ROOMS, SONGS, TOPICS, invented, person, place

GRAMMAR: dict[str, dict[str, list[str]]] = {
    "en": {
        "chore": [*CHORES["en"], *["<do> the <object>"] * 12, *["<tell> <person>"] * 5, *["buy <good>", "buy <good> and <good>"] * 3,
                  "send the <paper> to <person>", "<read> the <paper>", "<read> the <paper>", "pick up <person>", "go to <place>", "meet <person> in <place>",
                  "take <good> to <person>", "practise <pastime>", "bring <good>", "learn <language>", "get the <object> from <person>", "tidy the <room>"],
        "do": "wash clean fix paint open close check move find return pack sell dry empty fill polish repair replace sort sweep wrap hang measure cover lift turn water warm shut".split(),
        "tell": "call|write to|visit|thank|ask|pay|help|wake|text|meet|answer".split("|"),
        "read": "read finish send print sign copy post translate shorten check".split(),
        "paper": "report letter form essay contract list story recipe speech plan summary diary poem".split(),
        "object": "plants|windows|car|bicycle|front door|roof|desk|boxes|shelves|curtains|carpet|fridge|garden|shed|keys|oven|sink|stairs|gate|suitcase|"
                  "mirror|piano|clock|tent|bathtub|lamp|sofa|stove|balcony|fence|bookcase|radio|heater|cupboard|basket|bottle|backpack|coat|boots".split("|"),
        "pastime": "chess tennis singing dancing swimming drawing cooking yoga running".split(),
        "note": [*NOTES["en"], *["<who> <state>"] * 10, "see you <when>", "call me <when>", "please bring <good>", "<person> says hello", "I will come <when>", "do not forget the <object>",
                 "can you buy <good>", "let us meet in <place>", "thank you for the <good>", "where is the <object>", "I need the <paper> <when>", "the <object> is in the <room>",
                 "we have no <good>", "<person> is waiting", "do you like <pastime>", "my <object> is broken", "who has the <object>", "wait for me in the <room>"],
        "who": "I am|we are|the bus is|the shop is|dinner is|the meeting is|my phone is|mum is|the cat is|the key is|everybody is|the lift is|my brother is|the doctor is|lunch is".split("|"),
        "state": "late|here|ready|at home|in the office|very tired|closed|on the way|under the mat|next to the door|fine|early|upstairs|lost|at the station|in the <room>|with <person>|in <place>|too loud|gone".split("|"),
        "when": "tomorrow|tonight|on Monday|on Friday|at noon|in an hour|next week|after lunch|in the morning|before six|soon|on Sunday".split("|"),
        "topic": [*TOPICS["en"], *["<kind> <thing>"] * 14, "how to <do> a <object>", "how to <do> the <object>", "<thing> in <place>", "the history of <thing>", "<person>", "<good> and <good>", "<pastime> for children",
                  "why <thing> are <kind>", "the price of <good>", "<kind> <object>", "learning <language>", "<pastime> in <place>"],
        "kind": "old green wooden electric cheap wild modern ancient frozen tiny giant famous silent organic hidden rare broken heavy simple bright local foreign common strange warm soft".split(),
        "thing": "bridges maps tea cars birds trains castles gardens rivers coins stamps dresses whales stars soup markets mountains islands forests clouds insects horses volcanoes deserts songs dances museums temples poems planets".split(),
        "song": [*SONGS["en"], *["<Feel> <Scene>"] * 14, "<Scene> of <place>", "<Feel> <Feel> <Scene>", "<person>'s <Scene>", "The <Scene>", "My <Feel> <Scene>", "<Scene> and <Scene>"],
        "Feel": "Blue Golden Silver Lonely Happy Broken Wild Quiet Northern Southern Early Final Endless Little Sweet Burning Falling Distant Velvet Crimson".split(),
        "Scene": "Moon River Rain Night Morning Road Days Stars Wind Home Fire Heart Summer Train Garden Dream Ocean Shadow Highway Mountain Letter Window".split(),
        "room": [*ROOMS["en"], *"attic|cellar|office|guest room|dining room|nursery|laundry|library|porch|playroom|workshop|upper hall|back room|front room|first floor|pantry".split("|"), "<person>'s room"],
        "language": [*LANGUAGES["en"], *"Portuguese Dutch Swedish Danish Finnish Polish Czech Greek Turkish Hindi Thai Latin Hebrew Welsh Irish Persian Malay Swahili Norwegian Hungarian Ukrainian Romanian Bengali Tamil Icelandic".split()],
        "word": "<do> <object> <kind> <thing> <paper> <pastime> <good> <invented>".split(),
        "headline": ["<kind> <thing>", "<place>", "<pastime>", "<thing> in <place>", "<language> <thing>", "the <object> of <person>"],
    },
    "zh": {
        "chore": [*CHORES["zh"], *["<do><object>"] * 12, *["给<person><tell>"] * 5, *["买<good>", "买<good>和<good>"] * 3, "把<paper>发给<person>", "<read><paper>", "<read><paper>", "接<person>",
                  "去<place>", "去<place>见<person>", "给<person>送<good>", "练<pastime>", "带上<good>", "学<language>", "找<person>拿<object>", "收拾<room>"],
        "do": "洗 擦 修 刷 打开 关上 检查 搬 找 还 收拾 卖掉 晾 倒空 装满 整理 打扫 换 包好 挂好 量 盖好 擦干净".split(),
        "tell": "打电话 写信 回信 发邮件 道谢 回电话 付钱 帮忙".split(),
        "read": "看 写完 寄出 签 抄写 翻译 检查 交".split(),
        "paper": "报告 信 表格 作文 合同 清单 故事 菜谱 讲稿 计划 总结 日记 诗".split(),
        "object": "花盆 窗户 汽车 自行车 大门 屋顶 书桌 箱子 架子 窗帘 地毯 冰箱 花园 钥匙 烤箱 水池 楼梯 行李箱 镜子 钢琴 闹钟 帐篷 浴缸 台灯 沙发 炉子 阳台 篱笆 书柜 收音机 暖气 碗柜 篮子 瓶子 背包 大衣 靴子".split(),
        "pastime": "下棋 网球 唱歌 跳舞 游泳 画画 做饭 瑜伽 跑步".split(),
        "note": [*NOTES["zh"], *["<who><state>"] * 10, "<when>见", "<when>给我打电话", "请带上<good>", "<person>向你问好", "我<when>来", "别忘了<object>", "能买点<good>吗", "我们在<place>见面",
                 "谢谢你的<good>", "<object>在哪里", "我<when>要<paper>", "<object>在<room>里", "我们没有<good>了", "<person>在等", "你喜欢<pastime>吗", "我的<object>坏了", "谁拿了<object>", "在<room>等我"],
        "who": "我 我们 公交车 商店 晚饭 会议 手机 妈妈 猫 大家 电梯 弟弟 医生 午饭".split(),
        "state": "迟到了 到了 准备好了 在家 在办公室 很累 关门了 在路上 在门边 很好 提前了 在楼上 不见了 在车站 在<room> 和<person>在一起 在<place> 太吵了 走了".split(),
        "when": "明天 今晚 周一 周五 中午 一小时后 下周 午饭后 早上 六点前 马上 周日".split(),
        "topic": [*TOPICS["zh"], *["<kind>的<thing>"] * 14, "怎么<do><object>", "如何<do><object>", "<place>的<thing>", "<thing>的历史", "<person>", "<good>和<good>", "儿童<pastime>", "<thing>为什么<kind>", "<good>的价格", "<kind>的<object>", "学习<language>", "在<place><pastime>"],
        "kind": "古老 绿色 木头 便宜 野生 现代 冰冻 巨大 有名 安静 有机 隐秘 稀有 破旧 沉重 简单 明亮 本地 外国 常见 奇怪 温暖 柔软".split(),
        "thing": "桥 地图 茶 汽车 鸟 火车 城堡 花园 河流 硬币 邮票 裙子 鲸鱼 星星 汤 市场 山 岛屿 森林 云 昆虫 马 火山 沙漠 歌曲 舞蹈 博物馆 寺庙 诗 行星".split(),
        "song": [*SONGS["zh"], *["<Feel>的<Scene>"] * 12, "<place>的<Scene>", "<Feel><Scene>", "<Feel><Scene>", "<person>的<Scene>", "<Scene>与<Scene>", "我的<Scene>"],
        "Feel": "蓝色 金色 银色 孤独 快乐 破碎 狂野 安静 北方 南方 清晨 最后 无尽 小小 甜蜜 燃烧 坠落 遥远 温柔 红色".split(),
        "Scene": "月亮 河流 雨 夜 早晨 路 岁月 星光 风 家 火 心 夏天 列车 花园 梦 海洋 影子 公路 山 信 窗".split(),
        "room": [*ROOMS["zh"], *"阁楼 地窖 办公室 客房 餐厅 儿童房 洗衣房 图书室 门廊 游戏室 工作间 楼上走廊 里屋 前厅 一楼 储藏室".split(), "<person>的房间"],
        "language": [*LANGUAGES["zh"], *"葡萄牙语 荷兰语 瑞典语 丹麦语 芬兰语 波兰语 捷克语 希腊语 土耳其语 印地语 泰语 拉丁语 希伯来语 威尔士语 爱尔兰语 波斯语 马来语 斯瓦希里语 挪威语 匈牙利语 乌克兰语 罗马尼亚语 孟加拉语 泰米尔语 冰岛语".split()],
        "word": "<do> <object> <kind> <thing> <paper> <pastime> <good> <invented>".split(),
        "headline": ["<kind>的<thing>", "<place>", "<pastime>", "<place>的<thing>", "<language><thing>", "<person>的<object>"],
    },
}  # fmt: skip
NAMES = {"person": person, "place": place, "invented": invented,
         "good": lambda rng, lang: rng.choice(GOODS[lang])}  # fmt: skip


def phrase(rng: Random, lang: str, kind: str) -> str:
    """A phrase of the kind, or a name."""
    if kind in NAMES:
        return NAMES[kind](rng, lang)
    return re.sub(r"<(\w+)>", lambda part: phrase(rng, lang, part[1]), rng.choice(GRAMMAR[lang][kind]))


def english() -> set[str]:
    """The longer words of every list in English, in small letters."""
    lists = (GOODS, DAYS, PEOPLE)
    phrases = [text for texts in GRAMMAR["en"].values() for text in texts] + [
        word for words in lists for word in words["en"]
    ]
    return {word.lower() for text in phrases for word in re.sub("<.*?>", " ", text).split() if len(word) > 3}
