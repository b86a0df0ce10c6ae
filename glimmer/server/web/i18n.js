/**
 * The words of the page in English and Chinese. `t` gives one, `translate` writes those that index.html names in its data
 * attributes. The language is the browser's unless another was chosen.
 */

const WORDS = {
  addKey: ["Enter API key", "输入 API 密钥"],
  again: ["Answer again", "重新回答"],
  answer: ["Answer", "回答"],
  answerBegins: ["The answer is coming.", "正在回答。"],
  answerEnds: ["The answer is complete.", "回答完毕。"],
  answerForm: ["Form of the answer", "回答格式"],
  appearance: ["Colours", "外观"],
  arguments: ["Arguments", "参数"],
  cached: ["{0} of {1} prompt tokens from the cache", "提示 {1} 个词元中 {0} 个来自缓存"],
  calls: ["The model calls a tool", "模型调用工具"],
  cancel: ["Cancel", "取消"],
  close: ["Close", "关闭"],
  closeSidebar: ["Close the list", "关闭列表"],
  contextUsed: ["Context: {0} of {1} tokens", "上下文：{1} 个词元中已用 {0} 个"],
  contextUsedAlone: ["Context: {0} tokens", "上下文：已用 {0} 个词元"],
  conversation: ["Conversation", "对话"],
  conversations: ["Conversations", "对话列表"],
  copy: ["Copy", "复制"],
  cutAtLength: ["The answer was cut at the token limit.", "回答因达到词元上限而中断。"],
  dark: ["Dark", "深色"],
  data: ["Data", "数据"],
  dataHint: ["Conversations are kept in this browser only.", "对话只保存在此浏览器中。"],
  deleteOne: ["Delete “{0}”", "删除“{0}”"],
  deleted: ["Deleted.", "已删除。"],
  edit: ["Edit", "编辑"],
  editResults: ["Change the results", "修改结果"],
  errorInterrupted: ["The connection ended while it came.", "回答过程中连接已中断。"],
  errorIncomplete: ["The answer is incomplete", "回答不完整"],
  errorTitle: ["No answer", "未能回答"],
  errorUnreachable: ["The server cannot be reached. Is it running?", "无法连接服务器。服务器是否在运行？"],
  exportAll: ["Export all", "全部导出"],
  exportOne: ["Export this conversation", "导出此对话"],
  firstToken: ["{0} s to the first token", "首词元 {0} 秒"],
  formatChip: ["JSON schema", "JSON 模式"],
  formatHint: [
    "A JSON schema, or a whole response_format. The answer will conform to it.",
    "JSON Schema，或完整的 response_format。回答将符合它。",
  ],
  frequency_penalty: ["Frequency penalty", "频率惩罚"],
  hint: ["Enter sends, Shift+Enter begins a line", "Enter 发送，Shift+Enter 换行"],
  import: ["Import…", "导入…"],
  imported: ["Imported: {0}", "已导入：{0}"],
  importFailed: [
    "The file cannot be imported: {0}. Take one that this page has exported.",
    "无法导入文件：{0}。请选择本页导出的文件。",
  ],
  instructions: ["Instructions", "指令"],
  keyHint: [
    "The server asks for an API key (glimmer serve --api-key).",
    "服务器需要 API 密钥（glimmer serve --api-key）。",
  ],
  keyRemember: ["Keep it in this browser", "保存在此浏览器中"],
  keyTitle: ["API key", "API 密钥"],
  language: ["Language", "语言"],
  light: ["Light", "浅色"],
  max_tokens: ["Longest answer, tokens", "回答上限（词元）"],
  message: ["Message", "输入消息"],
  min_p: ["Min p", "Min p"],
  min_tokens: ["Shortest answer, tokens", "回答下限（词元）"],
  newConversation: ["New conversation", "新对话"],
  nextVersion: ["Next version", "下一版本"],
  noStorage: [
    "Conversations cannot be kept in this browser: {0}. Export what should last.",
    "此浏览器无法保存对话：{0}。请导出需要保留的内容。",
  ],
  notJson: ["This is not JSON: {0}", "不是有效的 JSON：{0}"],
  notNumber: ["This is not a number that can be used here.", "此处不能使用该数值。"],
  notSchema: ["A JSON object is expected.", "应为 JSON 对象。"],
  outOfRange: ["Expected: {0}", "应在此范围内：{0}"],
  presence_penalty: ["Presence penalty", "存在惩罚"],
  previousVersion: ["Previous version", "上一版本"],
  rename: ["Rename", "重命名"],
  repetition_penalty: ["Repetition penalty", "重复惩罚"],
  result: ["Result", "结果"],
  resultFor: ["Result of {0}", "{0} 的结果"],
  retry: ["Try again", "重试"],
  sampling: ["Sampling", "采样"],
  samplingHint: ["Empty: as the server has it.", "留空则使用服务器的默认值。"],
  save: ["Save", "保存"],
  saveAndAsk: ["Save and ask", "保存并提问"],
  seed: ["Seed", "随机种子"],
  send: ["Send", "发送"],
  sendResults: ["Send results", "发送结果"],
  settings: ["Settings", "设置"],
  settingsHint: ["For this conversation, and those begun after it.", "用于此对话及之后新建的对话。"],
  starterCode: ["Write a Python function that merges two sorted lists.", "写一个合并两个有序列表的 Python 函数。"],
  starterMath: ["Why is the square root of 2 irrational?", "为什么 2 的平方根是无理数？"],
  starterTool: ["What is the weather in Paris?", "巴黎的天气怎么样？"],
  starterToolNote: ["with a tool", "使用工具"],
  stop: ["Stop", "停止"],
  stopStrings: ["Stop strings, one a line", "停止字符串，每行一个"],
  stopped: ["Stopped.", "已停止。"],
  system: ["System message", "系统消息"],
  systemTheme: ["As the system", "跟随系统"],
  temperature: ["Temperature", "温度"],
  thinking: ["Thinking", "思考"],
  thinkingNow: ["Thinking…", "思考中…"],
  thisPage: ["This page", "本页"],
  thought: ["Thought", "已思考"],
  thoughtFor: ["Thought for {0} s", "思考了 {0} 秒"],
  toEnd: ["To the end", "到末尾"],
  tokenRate: ["{0} tokens/s", "{0} 词元/秒"],
  tokens: ["{0} tokens", "{0} 个词元"],
  tool_choice: ["Which tools are called", "工具调用"],
  toolChoiceAuto: ["As the model decides", "由模型决定"],
  toolChoiceNone: ["None", "不调用"],
  toolChoiceRequired: ["At least one", "至少调用一个"],
  toolWithoutName: ["Each tool needs a function with a name.", "每个工具都需要有名称的 function。"],
  tools: ["Tools", "工具"],
  toolsChip: ["Tools: {0}", "工具：{0}"],
  toolsChipNone: ["Tools", "工具"],
  toolsLabel: ["Functions (JSON)", "函数（JSON）"],
  toolsHint: [
    "A JSON list of functions, as in OpenAI's API. You give the results.",
    "OpenAI 格式的函数 JSON 列表。结果由您填写。",
  ],
  top_k: ["Top k", "Top k"],
  top_p: ["Top p", "Top p"],
  undo: ["Undo", "撤销"],
  untitled: ["New conversation", "新对话"],
  versionOf: ["{0} / {1}", "{0} / {1}"],
  waitsForResult: ["waits for a result", "等待结果"],
  wasAnswered: ["answered", "已回复"],
  welcome: ["What would you like to know?", "想了解什么？"],
  you: ["You", "您"],
};

export const LANGUAGES = { en: "English", zh: "中文" };
const KEY = "glimmer.language";

let language = localStorage.getItem(KEY);
if (!Object.hasOwn(LANGUAGES, language ?? "")) language = navigator.language.startsWith("zh") ? "zh" : "en";

export const currentLanguage = () => language;

export function setLanguage(chosen) {
  language = chosen;
  localStorage.setItem(KEY, chosen);
}

/** The word of a name in the language of the page; {0}, {1}... are replaced by the values. */
export function t(name, ...values) {
  return WORDS[name][language === "zh" ? 1 : 0].replace(/\{(\d)\}/g, (_, index) => values[index]);
}

/** A whole number, or one with `digits` decimals, as the language writes it. */
export function n(value, digits = 0) {
  return value.toLocaleString(language, { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** Writes the words that the elements under `root` ask for: data-text, data-label, data-title, data-placeholder. */
export function translate(root) {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of root.querySelectorAll("[data-text]")) element.textContent = t(element.dataset.text);
  for (const element of root.querySelectorAll("[data-placeholder]"))
    element.placeholder = t(element.dataset.placeholder);
  for (const element of root.querySelectorAll("[data-title]")) element.title = t(element.dataset.title);
  for (const element of root.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", t(element.dataset.label));
    if (element.localName === "button") element.title = t(element.dataset.label);
  }
}
