// The server's HTTP API: models, and chats as a stream of chunks.

/** What went wrong, in one line. `status`: of HTTP, or 0 when there was no answer. */
export class ApiFailure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Names of the models that are served. */
export async function listModels(key) {
  const answer = await call("v1/models", { headers: authorization(key) });
  const { data } = await answer.json();
  return data.map((model) => model.id);
}

/** Chunks of /v1/chat/completions until the answer is whole. Aborting `signal` ends it with an AbortError. */
export async function* streamChat(body, key, signal) {
  const answer = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...authorization(key) },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiFailure(chunk.error.message);
    yield chunk;
  }
  throw new ApiFailure("The connection ended before the answer did.");
}

function authorization(key) {
  if (/[^\x21-\x7e]/.test(key)) throw new ApiFailure("The API key has characters that no key has.");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function call(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiFailure("The server can't be reached.");
  }
  if (answer.ok) return answer;
  let message = answer.statusText;
  try {
    message = (await answer.json()).error.message;
  } catch { /* not from ATOM: a proxy, perhaps */ }
  throw new ApiFailure(`${answer.status}: ${message}`, answer.status);
}

/** The data of server-sent events. */
async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } else if (line === "" && data.length) {
          const event = data.join("\n");
          data = [];
          yield event;
        }
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiFailure("The connection broke before the answer was whole.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
