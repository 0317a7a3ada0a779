// The live view of the engine, from /metrics.

const SECONDS = 60;
const SVG = "http://www.w3.org/2000/svg";

/** Prometheus' text format: the sum of each name's samples. */
export function parseMetrics(text) {
  const sums = new Map();
  for (const line of text.split("\n")) {
    const found = /^([A-Za-z_:][\w:]*)(?:\{.*\})?\s+(\S+)/.exec(line);
    if (found) sums.set(found[1], (sums.get(found[1]) ?? 0) + Number(found[2]));
  }
  return sums;
}

/** Polls once a second while the tab is seen, and shows the last minute. */
export class EngineView {
  #meters = new Map();
  #last = null; // {time, generation, prompt}
  #timer = 0;

  /** onReturn(): the engine serves again. */
  constructor({ meters, state, totals, glance, onReturn }) {
    this.onReturn = onReturn;
    this.state = state;
    this.totals = totals;
    this.glance = glance;
    for (const element of meters.querySelectorAll("[data-meter]")) {
      this.#meters.set(element.dataset.meter, new Meter(element));
    }
    document.addEventListener("visibilitychange", () => this.#visibilityChanged());
    this.#visibilityChanged();
  }

  #visibilityChanged() {
    clearTimeout(this.#timer);
    this.#last = null; // no rate over the time that nobody looked
    if (!document.hidden) this.#poll();
  }

  async #poll() {
    const started = performance.now();
    try {
      const answer = await fetch("metrics", { signal: AbortSignal.timeout(5000), cache: "no-store" });
      if (!answer.ok) throw new Error(answer.statusText);
      this.#show(parseMetrics(await answer.text()), performance.now());
    } catch {
      this.#setState("down", "unreachable");
      this.#last = null;
    }
    clearTimeout(this.#timer);
    if (!document.hidden) {
      this.#timer = setTimeout(() => this.#poll(), Math.max(100, started + 1000 - performance.now()));
    }
  }

  #show(metrics, time) {
    const value = (name) => metrics.get(`atom:${name}`) ?? 0;
    const now = { time, generation: value("generation_tokens_total"), prompt: value("prompt_tokens_total") };
    const rate = (name) => {
      if (!this.#last) return 0;
      return Math.max(0, now[name] - this.#last[name]) / ((time - this.#last.time) / 1000); // a new server starts at 0
    };
    const generation = rate("generation");
    const running = value("num_requests_running");
    const waiting = value("num_requests_waiting");
    const cache = value("kv_cache_usage_perc");
    this.#meters.get("generation").push(generation, `${number(generation)} tok/s`, 1);
    this.#meters.get("running").push(running, String(running), 1);
    this.#meters.get("waiting").push(waiting, String(waiting), 1);
    this.#meters.get("cache").push(cache, percent(cache), 0.01);
    const queries = value("prefix_cache_queries_total");
    const hits = queries ? value("prefix_cache_hits_total") / queries : 0;
    this.totals.textContent = `Prompts ${number(rate("prompt"))} tok/s, ${percent(hits)} from cache`;
    this.glance.textContent = `${number(generation)} tok/s`;
    if (value("engine_up")) this.#setState("up", running ? "busy" : "ready");
    else this.#setState("down", "down");
    this.#last = now;
  }

  #setState(state, text) {
    if (state === "up" && this.state.dataset.state === "down") this.onReturn();
    this.state.dataset.state = state;
    if (this.state.textContent !== text) this.state.textContent = text;
    if (state === "down") this.glance.textContent = text;
  }
}

class Meter {
  #history = [];

  constructor(element) {
    this.value = element.querySelector("dd");
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", `0 0 ${SECONDS - 1} 20`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    this.area = document.createElementNS(SVG, "polygon");
    this.line = document.createElementNS(SVG, "polyline");
    svg.append(this.area, this.line);
    element.append(svg);
  }

  /** `least`: the height of the graph is at least that. */
  push(value, text, least) {
    this.value.textContent = text;
    this.#history.push(value);
    if (this.#history.length > SECONDS) this.#history.shift();
    const top = Math.max(least, ...this.#history);
    const first = SECONDS - this.#history.length;
    const points = this.#history.map((past, i) => `${first + i},${(19 - 18 * (past / top)).toFixed(2)}`).join(" ");
    this.line.setAttribute("points", points);
    this.area.setAttribute("points", `${first},20 ${points} ${SECONDS - 1},20`);
  }
}

function number(value) {
  return value >= 100 ? Math.round(value).toLocaleString("en") : value.toFixed(value && value < 10 ? 1 : 0);
}

function percent(share) {
  const value = 100 * share;
  return `${value > 0 && value < 10 ? value.toFixed(1) : Math.round(value)}%`;
}
