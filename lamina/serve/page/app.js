// The chat, and what both views share: the API key, the state of the server, the tabs.

import { showCluster } from "./cluster.js";

const $ = (id) => document.getElementById(id);
const turns = []; // what the model is told: {role, content}
let running = null; // the AbortController of the answer that is being written
let continues = false; // whether the model has no chat template, so that it continues texts instead

export function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// -- the server

export async function ask(path, { body, signal } = {}) {
  const headers = {};
  const key = $("key").value.trim();
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    const method = body === undefined ? "GET" : "POST";
    answer = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  if (answer.ok) return answer;
  let said = "";
  try {
    said = messageOf(await answer.json());
  } catch {
    // No JSON: a proxy may have answered.
  }
  if (answer.status === 401) said = `${said || "The server wants an API key."} Enter it under Settings.`;
  const failure = new Error(said || `The server answered ${answer.status} ${answer.statusText}.`);
  failure.status = answer.status;
  throw failure;
}

function messageOf(plain) {
  const error = plain?.error ?? plain?.detail ?? plain;
  return typeof error === "string" ? error : (error?.message ?? "");
}

async function lookAround() {
  const health = $("health");
  try {
    const models = (await (await ask("v1/models")).json()).data ?? [];
    const select = $("model");
    if (select.options.length !== models.length) {
      select.replaceChildren(...models.map((model) => new Option(model.id, model.id)));
    }
    $("model-name").textContent = select.value || "Ask the model";
    health.firstElementChild.className = "dot ready";
    health.lastElementChild.textContent = select.value || "ready";
  } catch (error) {
    health.firstElementChild.className = error.status === 401 ? "dot waiting" : "dot away";
    health.lastElementChild.textContent = error.status === 401 ? "needs an API key" : "not ready";
    health.title = error.message;
  }
}

// -- an answer

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The connection broke off in the middle of the answer.");
    }
    if (piece.done) return;
    rest += piece.value;
    const lines = rest.split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(messageOf(event) || "The server reported an error.");
      yield event;
    }
  }
}

function request() {
  const body = { model: $("model").value || "default", stream: true, stream_options: { include_usage: true } };
  const temperature = $("temperature").valueAsNumber;
  const most = $("max-tokens").valueAsNumber;
  if (!Number.isNaN(temperature)) body.temperature = temperature;
  if (most >= 1) body.max_tokens = Math.floor(most);
  return body;
}

async function open(signal) {
  if (!continues) {
    try {
      return await ask("v1/chat/completions", { body: { ...request(), messages: turns }, signal });
    } catch (error) {
      if (error.status !== 400 || !/chat.?template/i.test(error.message)) throw error;
      continues = true;
      $("hello-text").textContent = "This model has no chat template: it continues your text.";
      $("input").placeholder = "Begin a text; the model continues it";
    }
  }
  return ask("v1/completions", { body: { ...request(), prompt: turns.at(-1).content }, signal });
}

async function answer(text) {
  turns.push({ role: "user", content: text });
  const asked = addTurn("user");
  asked.words.textContent = text;
  const shown = addTurn("assistant");
  shown.turn.classList.add("writing");
  running = new AbortController();
  setRunning(true);
  let content = "", count = 0, first = 0, last = 0, reason = "";
  try {
    const opened = await open(running.signal);
    if (continues) {
      // What was given and what the model adds read as one text.
      asked.turn.remove();
      shown.words.append(element("span", "given", text));
    }
    for await (const event of events(opened)) {
      const choice = event.choices?.[0];
      const words = choice?.delta?.content ?? choice?.text ?? "";
      const thought = choice?.delta?.reasoning_content ?? choice?.delta?.reasoning ?? "";
      if (words || thought) {
        last = performance.now();
        first ||= last;
        count += 1;
        content += words;
        follow(() => {
          shown.words.append(words);
          shown.thought.append(thought);
        });
      }
      if (choice?.finish_reason) reason = choice.finish_reason;
      if (event.usage?.completion_tokens) count = event.usage.completion_tokens;
      if (first && last > first) $("speed").textContent = `${rate(count, last - first)} tokens/s`;
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else follow(() => (shown.error.textContent = error.message));
  }
  shown.turn.classList.remove("writing");
  const facts = [count && `${count} tokens`, last > first && `${rate(count, last - first)} tokens/s`];
  if (reason === "length") facts.push("ended at the most tokens");
  if (reason === "stopped") facts.push("stopped");
  follow(() => (shown.facts.textContent = facts.filter(Boolean).join(" · ")));
  if (content) turns.push({ role: "assistant", content });
  else turns.pop();
  $("speed").textContent = "";
  running = null;
  setRunning(false);
}

function rate(tokens, milliseconds) {
  const value = (1000 * Math.max(1, tokens - 1)) / milliseconds;
  return value >= 10 ? Math.round(value) : value.toFixed(1);
}

function addTurn(role) {
  $("hello").hidden = true;
  const turn = element("div", `turn ${role}`);
  const [thought, words] = [element("div", "thought"), element("div", "words")];
  const [error, facts] = [element("p", "error"), element("div", "facts")];
  turn.append(thought, words, error, facts);
  error.setAttribute("role", "alert");
  $("log").append(turn);
  $("log").scrollTop = $("log").scrollHeight;
  return { turn, thought, words, error, facts };
}

// Keep the end in sight while the answer grows, unless the reader has scrolled up.
function follow(change) {
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function setRunning(runs) {
  $("send").hidden = runs;
  $("stop").hidden = !runs;
  $("clear").disabled = runs;
}

// -- what the reader does

function fit() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("input").value;
  if (running || !text.trim()) return;
  $("input").value = "";
  fit();
  answer(text);
});
$("input").addEventListener("input", fit);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  turns.length = 0;
  $("log").replaceChildren($("hello"));
  $("hello").hidden = false;
  $("input").focus();
});
document.addEventListener("click", (event) => {
  if (!$("settings").contains(event.target)) $("settings").open = false;
});
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value.trim());
  lookAround();
});

function select(name) {
  for (const view of ["chat", "cluster"]) {
    $(view).hidden = view !== name;
    $(`tab-${view}`).setAttribute("aria-selected", String(view === name));
  }
  showCluster(name === "cluster");
}
for (const view of ["chat", "cluster"]) {
  $(`tab-${view}`).addEventListener("click", () => (location.hash = view));
}
addEventListener("hashchange", () => select(location.hash === "#cluster" ? "cluster" : "chat"));
select(location.hash === "#cluster" ? "cluster" : "chat");
lookAround();
setInterval(lookAround, 5000);
$("input").focus();
