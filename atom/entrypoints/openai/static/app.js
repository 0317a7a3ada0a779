// The page: settings, keys and buttons around the conversation and the view of the engine.

import { listModels } from "./api.js";
import { Conversation } from "./chat.js";
import { EngineView } from "./engine.js";

const byId = (id) => document.getElementById(id);
const question = byId("question");
const settings = byId("settings");
const model = byId("model");
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

const conversation = new Conversation({
  list: byId("exchanges"),
  scroller: byId("transcript"),
  status: byId("status"),
  options: readSettings,
  onChange: conversationChanged,
  onFailure: (failure) => { if (failure.status === 401) askForKey(); },
});

function readSettings() {
  const field = (name) => settings.elements[name].value;
  const body = { model: model.value || undefined };
  for (const name of NUMBERS) {
    if (field(name) !== "") body[name] = Number(field(name));
  }
  const stop = field("stop").split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));
  if (stop.length) body.stop = stop;
  return { body, system: field("system").trim(), key: field("key").trim() };
}

function conversationChanged() {
  const { busy, empty } = conversation;
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("clear").disabled = empty;
  byId("welcome").hidden = !empty;
}

// -- asking --

function send() {
  const text = question.value.trim();
  if (!text || conversation.busy) return;
  question.value = "";
  fitQuestion();
  conversation.ask(text);
}

function fitQuestion() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
question.addEventListener("input", fitQuestion);
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // composing: Enter picks a candidate
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (document.body.classList.contains("open")) showPanel(false);
  else conversation.stop();
});
byId("stop").addEventListener("click", () => {
  conversation.stop();
  question.focus();
});
byId("clear").addEventListener("click", () => {
  conversation.clear();
  question.focus();
});
for (const example of document.querySelectorAll(".examples button")) {
  example.addEventListener("click", () => {
    conversation.ask(example.textContent);
    question.focus();
  });
}

// -- settings: kept with the tab --

function showPanel(open) {
  document.body.classList.toggle("open", open);
  byId("toggle").setAttribute("aria-expanded", String(open));
  byId("toggle").textContent = open ? "Close" : "Settings";
}

function askForKey() {
  showPanel(true);
  if (question.value === "") settings.elements.key.focus();
}

function storage(action) {
  try {
    return action(sessionStorage);
  } catch { // the browser may forbid it
    return null;
  }
}

for (const field of settings.elements) {
  if (!field.name) continue;
  field.value = storage((kept) => kept.getItem(`atom.${field.name}`)) ?? "";
  field.addEventListener("change", () => storage((kept) => kept.setItem(`atom.${field.name}`, field.value)));
}
settings.addEventListener("submit", (event) => event.preventDefault());
settings.elements.key.addEventListener("change", loadModels);
byId("toggle").addEventListener("click", () => showPanel(!document.body.classList.contains("open")));

// -- models --

let latestLoad = 0;

/** The failure, or null. It leaves the focus where it is: somebody may be writing. */
async function loadModels() {
  const load = ++latestLoad;
  const notice = byId("notice");
  try {
    const names = await listModels(settings.elements.key.value.trim());
    if (load !== latestLoad) return null;
    model.replaceChildren(...names.map((name) => new Option(name, name)));
    model.disabled = names.length === 0;
    notice.hidden = true;
    return null;
  } catch (error) {
    if (load !== latestLoad) return null;
    notice.textContent = error.status === 401 ? "This server needs an API key: enter it in the settings."
      : error.message;
    notice.hidden = false;
    return error;
  }
}

new EngineView({
  meters: byId("meters"),
  state: byId("state"),
  totals: byId("totals"),
  glance: byId("glance"),
  onReturn: loadModels, // perhaps with another model
});
if ((await loadModels())?.status === 401) askForKey();
