// The conversation: questions, and answers as they come.

import { streamChat } from "./api.js";
import { copyText, showText } from "./text.js";

/** One question with its answer, as data and on the page. */
class Exchange {
  answer = "";
  reasoning = "";

  constructor(question, { onAgain }) {
    this.question = question;
    this.element = document.getElementById("exchange").content.firstElementChild.cloneNode(true);
    const find = (selector) => this.element.querySelector(selector);
    this.article = find(".answer");
    this.details = find(".reasoning");
    this.reasoningText = find(".reasoning .text");
    this.text = find(".answer > .text");
    this.error = find(".error");
    this.figures = find(".figures");
    this.copy = find(".copy");
    this.again = find(".again");
    find(".user").textContent = question;
    this.copy.addEventListener("click", () => copyText(this.answer || this.reasoning, this.copy));
    this.again.addEventListener("click", onAgain);
  }

  start() {
    this.answer = this.reasoning = "";
    this.startedAt = performance.now();
    this.firstAt = this.lastAt = this.tokens = 0;
    this.finishReason = null;
    this.error.hidden = this.copy.hidden = this.again.hidden = true;
    this.details.hidden = true;
    this.details.open = false;
    this.article.setAttribute("aria-busy", "true");
    this.show();
  }

  take(chunk) {
    const now = performance.now();
    for (const choice of chunk.choices) {
      const { content, reasoning_content: reasoning } = choice.delta;
      if (reasoning) {
        if (!this.reasoning) this.details.open = true; // seen while it is all there is
        this.reasoning += reasoning;
      }
      if (content) {
        if (!this.answer && this.reasoning) this.details.open = false;
        this.answer += content;
      }
      const count = choice.token_ids?.length ?? 0;
      if (count) {
        this.tokens += count;
        this.lastAt = now;
        if (!this.firstAt) {
          this.firstAt = now;
          this.firstTokens = count;
        }
      }
      this.finishReason = choice.finish_reason ?? this.finishReason;
    }
    if (chunk.usage) this.tokens = chunk.usage.completion_tokens;
  }

  show() {
    if (this.reasoning) {
      this.details.hidden = false;
      showText(this.reasoningText, this.reasoning.trim());
    }
    showText(this.text, this.answer);
    this.figures.textContent = this.describe();
  }

  end(failure, stopped) {
    if (stopped) this.finishReason = "stopped";
    this.article.setAttribute("aria-busy", "false");
    this.error.hidden = !failure;
    this.error.textContent = failure?.message ?? "";
    this.copy.hidden = !(this.answer || this.reasoning);
    this.again.textContent = failure ? "Try again" : "Regenerate";
    this.show();
  }

  /** Time to the first token, and the rate of those after it. */
  describe() {
    const parts = [];
    if (this.firstAt) {
      const seconds = (this.lastAt - this.firstAt) / 1000;
      parts.push(`TTFT ${duration(this.firstAt - this.startedAt)}`);
      if (seconds > 0) parts.push(`${((this.tokens - this.firstTokens) / seconds).toFixed(1)} tok/s`);
      parts.push(`${this.tokens} ${this.tokens === 1 ? "token" : "tokens"}`);
    }
    if (this.finishReason === "length") parts.push("cut at the limit");
    else if (this.finishReason === "stopped") parts.push("stopped");
    return parts.join(" · ");
  }
}

/** options: () => {body, system, key} of the next request; onChange() after every start and end. */
export class Conversation {
  #exchanges = [];
  #abort = null; // of the request that runs

  constructor({ list, scroller, status, options, onChange, onFailure }) {
    Object.assign(this, { list, scroller, status, options, onChange, onFailure });
  }

  get busy() {
    return this.#abort !== null;
  }

  get empty() {
    return this.#exchanges.length === 0;
  }

  ask(question) {
    if (this.busy) return;
    const exchange = new Exchange(question, { onAgain: () => this.#answer(exchange) });
    const last = this.#exchanges.at(-1);
    if (last) last.again.hidden = true;
    this.#exchanges.push(exchange);
    this.list.append(exchange.element);
    this.#answer(exchange);
  }

  stop() {
    this.#abort?.abort();
  }

  clear() {
    this.stop();
    this.#exchanges = [];
    this.list.replaceChildren();
    this.onChange();
  }

  async #answer(exchange) {
    if (this.busy) return;
    const abort = this.#abort = new AbortController();
    const { body, system, key } = this.options();
    exchange.start();
    this.#follow(true);
    this.status.textContent = "Answering";
    this.onChange();
    let failure = null;
    let frame = 0;
    const show = () => {
      frame = 0;
      const follows = this.#atEnd();
      exchange.show();
      this.#follow(follows);
    };
    try {
      const messages = this.#messages(exchange, system);
      // return_token_ids: tokens are counted as they come, also those whose text is still held back.
      const request = { ...body, messages, return_token_ids: true, stream_options: { include_usage: true } };
      for await (const chunk of streamChat(request, key, abort.signal)) {
        exchange.take(chunk);
        frame ||= requestAnimationFrame(show);
      }
    } catch (error) {
      if (error.name !== "AbortError") failure = error;
    }
    cancelAnimationFrame(frame);
    const follows = this.#atEnd();
    exchange.end(failure, abort.signal.aborted);
    exchange.again.hidden = exchange !== this.#exchanges.at(-1);
    this.#follow(follows);
    this.status.textContent = failure ? "" : `Answer complete, ${exchange.tokens} tokens`; // failures are alerts
    if (this.#abort === abort) this.#abort = null;
    if (failure) this.onFailure(failure);
    this.onChange();
  }

  /** All before `exchange`, and its question. Questions without an answer are left out: many templates want turns. */
  #messages(exchange, system) {
    const messages = system ? [{ role: "system", content: system }] : [];
    for (const past of this.#exchanges) {
      if (past === exchange) break;
      if (!past.answer) continue;
      messages.push({ role: "user", content: past.question }, { role: "assistant", content: past.answer });
    }
    return [...messages, { role: "user", content: exchange.question }];
  }

  #atEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight < 48;
  }

  #follow(wanted) {
    if (wanted) this.scroller.scrollTop = this.scroller.scrollHeight;
  }
}

function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`;
}
