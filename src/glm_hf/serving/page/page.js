"use strict";

const MASKS = /(\[MASK\]|\[sMASK\]|\[gMASK\])/;
const NUM_ALTERNATIVES = 5;
const TEXTS = {
  en: {
    title: "Fill the blanks", other: "中文", label: "Text", short: "Insert a short blank", long: "Insert a long blank",
    hint: "Mark what is missing by [MASK], or a long passage at the end by [gMASK]. Without either, the text is continued. Ctrl+Enter fills.",
    example: "Example", settings: "Settings", length: "Most tokens per blank", temperature: "Temperature", key: "API key",
    fill: "Fill", stop: "Stop", answer: "Answer", working: "Writing …", stopped: "Stopped.", nothing: "(nothing)",
    done: "Done. Choose a blank to see other answers.", pick: "Other answers for this blank", unreachable: "The server cannot be reached.",
    examples: ["The capital of France is [MASK].", "The currency of Thailand is the [MASK] and its capital is [MASK].", "The opposite of hot is"],
  },
  zh: {
    title: "填空", other: "English", label: "文本", short: "插入短空", long: "插入长空",
    hint: "用 [MASK] 标出缺失的内容，或在末尾用 [gMASK] 标出长段落；都没有时续写文本。按 Ctrl+Enter 填写。",
    example: "示例", settings: "设置", length: "每个空最多词元数", temperature: "温度", key: "API 密钥",
    fill: "填写", stop: "停止", answer: "结果", working: "正在生成……", stopped: "已停止。", nothing: "（空）",
    done: "完成。点击任一空可查看其他答案。", pick: "此空的其他答案", unreachable: "无法连接服务器。",
    examples: ["法国的首都是[MASK]。", "[MASK]是法国的首都，[MASK]是日本的首都。", "法国的首都是"],
  },
};

const find = (id) => document.getElementById(id);
let language = navigator.language.startsWith("zh") ? "zh" : "en";
let numExamples = 0;
let model = null;
let running = null; // AbortController of the request under way
let parts = []; // of the text, by turns around the blanks and their masks
let blanks = []; // {text, alternatives, element}

function say(key) {
  return TEXTS[language][key];
}

function showTexts() {
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = say(element.dataset.text);
  find("language").textContent = say("other");
  document.title = say("title");
}

function headers() {
  const key = find("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function showError(message) {
  find("error").textContent = message;
  find("error").hidden = !message;
}

async function failure(response) {
  if (response.status === 401) {
    find("key-label").hidden = false;
    document.querySelector("details").open = true;
    find("key").focus();
  }
  const body = await response.json().catch(() => ({}));
  return new Error(body.error ? body.error.message : `${response.status} ${response.statusText}`);
}

async function findModel() {
  if (model) return;
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await failure(response);
  model = (await response.json()).data[0].id;
  find("model").textContent = model;
}

/** Yield the events of a stream, objects as the server has sent them. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const whole = (waiting + value).split("\n\n");
    waiting = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/** Show the text with a button for every blank. */
function showText() {
  const output = find("output");
  output.replaceChildren();
  blanks = [];
  parts.forEach((part, index) => {
    if (index % 2 === 0) {
      output.append(part);
      return;
    }
    const number = blanks.length;
    const element = document.createElement("button");
    element.type = "button";
    element.className = "blank";
    element.disabled = true;
    element.addEventListener("click", () => toggleChoices(number));
    blanks.push({ text: "", alternatives: [], element });
    output.append(element);
  });
}

function setBlank(number, text) {
  blanks[number].text = text;
  blanks[number].element.textContent = text;
}

/** Fill the blanks from `first` on; those before keep their answers. */
async function fill(first) {
  stop();
  showError("");
  closeChoices();
  const own = new AbortController();
  running = own;
  find("stop").hidden = false;
  find("status").textContent = say("working");
  let numBlanks = 0;
  const prompt = parts.map((part, index) => {
    if (index % 2 === 0) return part;
    const number = numBlanks++;
    return number < first ? blanks[number].text : part;
  }).join("");
  for (const blank of blanks.slice(first)) {
    Object.assign(blank, { text: "", alternatives: [] });
    blank.element.textContent = "";
    blank.element.disabled = true;
  }
  try {
    await findModel();
    const response = await fetch("v1/completions", {
      method: "POST",
      headers: headers(),
      signal: own.signal,
      body: JSON.stringify({
        model, prompt, stream: true, alternatives: NUM_ALTERNATIVES,
        max_tokens: Math.max(1, Math.round(Number(find("length").value) || 64)),
        temperature: Number(find("temperature").value) || 0,
      }),
    });
    if (!response.ok) throw await failure(response);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      for (const { blank, text, alternatives } of event.choices) {
        if (blank === undefined) continue;
        const number = first + blank;
        if (alternatives) {
          blanks[number].alternatives = alternatives;
          blanks[number].element.disabled = false;
          if (!blanks[number].text) blanks[number].element.textContent = say("nothing");
        } else {
          setBlank(number, blanks[number].text + text);
        }
      }
    }
    find("status").textContent = say("done");
  } catch (error) {
    find("status").textContent = own.signal.aborted ? say("stopped") : "";
    if (!own.signal.aborted) showError(error instanceof TypeError ? say("unreachable") : error.message);
  } finally {
    if (running === own) {
      running = null;
      find("stop").hidden = true;
    }
  }
}

function stop() {
  if (running) running.abort();
}

function closeChoices() {
  const open = document.querySelector(".choices");
  if (open) open.remove();
  for (const blank of blanks) blank.element.removeAttribute("aria-expanded");
}

/** Show the answers for a blank, the most probable first, or hide them. */
function toggleChoices(number) {
  const { alternatives, element, text } = blanks[number];
  const wasOpen = element.getAttribute("aria-expanded") === "true";
  closeChoices();
  if (wasOpen || !alternatives.length) return;
  element.setAttribute("aria-expanded", "true");
  const list = document.createElement("ul");
  list.className = "choices";
  list.setAttribute("role", "listbox");
  list.setAttribute("aria-label", say("pick"));
  for (const alternative of alternatives) {
    const item = document.createElement("li");
    item.setAttribute("role", "option");
    item.setAttribute("aria-selected", String(alternative.text === text));
    item.tabIndex = -1;
    const answer = document.createElement("span");
    answer.textContent = alternative.text || say("nothing");
    const share = document.createElement("span");
    share.className = "share";
    share.textContent = `${(100 * alternative.probability).toFixed(alternative.probability < 0.01 ? 3 : 1)} %`;
    item.append(answer, share);
    item.addEventListener("click", () => pick(number, alternative.text));
    list.append(item);
  }
  list.addEventListener("keydown", (event) => moveInChoices(event, number, list));
  find("output").after(list);
  (list.querySelector('[aria-selected="true"]') || list.firstChild).focus();
}

function moveInChoices(event, number, list) {
  const items = [...list.children];
  const place = items.indexOf(document.activeElement);
  const target = { ArrowDown: place + 1, ArrowUp: place - 1, Home: 0, End: items.length - 1 }[event.key];
  if (target !== undefined) {
    items[Math.min(Math.max(target, 0), items.length - 1)].focus();
  } else if (event.key === "Enter" || event.key === " ") {
    items[place].click();
  } else if (event.key === "Escape") {
    closeChoices();
    blanks[number].element.focus();
  } else {
    return;
  }
  event.preventDefault();
}

/** Take another answer for a blank, and fill those behind it anew. */
function pick(number, text) {
  closeChoices();
  setBlank(number, text);
  if (!text) blanks[number].element.textContent = say("nothing");
  blanks[number].element.focus();
  if (number + 1 < blanks.length) fill(number + 1);
}

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  parts = find("text").value.split(MASKS);
  if (parts.length === 1) parts.push("", ""); // it is continued
  showText();
  fill(0);
});
find("stop").addEventListener("click", stop);
find("language").addEventListener("click", () => {
  language = language === "en" ? "zh" : "en";
  numExamples = 0;
  showTexts();
});
find("example").addEventListener("click", () => {
  find("text").value = say("examples")[numExamples++ % say("examples").length];
});
find("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    find("form").requestSubmit();
  }
});
for (const button of document.querySelectorAll(".insert")) {
  button.addEventListener("click", () => {
    const text = find("text");
    text.setRangeText(button.dataset.insert, text.selectionStart, text.selectionEnd, "end");
    text.focus();
  });
}
showTexts();
findModel().catch((error) => showError(error instanceof TypeError ? say("unreachable") : error.message));
