// A model's text as elements: paragraphs, fenced code and `code`. Only ever through textContent.

/** Bring `container` to show `text`; what is already there and unchanged keeps its elements. */
export function showText(container, text) {
  const blocks = split(text);
  blocks.forEach((block, i) => {
    const there = container.children[i];
    const { code, language, source } = there?.block ?? {};
    if (code === block.code && language === block.language && source === block.source) return;
    const made = block.code ? codeElement(block, there) : paragraph(block);
    made.block = block;
    if (!there) container.append(made);
    else if (there !== made) there.replaceWith(made);
  });
  while (container.children.length > blocks.length) container.lastElementChild.remove();
}

/** Blocks of `text`; a fence that is still open reaches to the end. */
export function split(text) {
  const blocks = [];
  let lines = [];
  let fence = null;
  const flush = () => {
    const source = lines.join("\n");
    if (fence) blocks.push({ code: true, language: fence.language, source });
    else if (source.trim()) blocks.push({ code: false, source });
    lines = [];
  };
  for (const line of text.split("\n")) {
    const mark = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/.exec(line);
    if (fence) {
      if (mark && mark[1].startsWith(fence.mark) && !mark[2]) {
        flush();
        fence = null;
      } else lines.push(line);
    } else if (mark) {
      flush();
      fence = { mark: mark[1], language: mark[2].trim().split(/\s/)[0] };
    } else if (line.trim() === "") flush();
    else lines.push(line);
  }
  if (lines.length || fence) flush();
  return blocks;
}

function paragraph({ source }) {
  const element = document.createElement("p");
  source.split(/(`[^`\n]+`)/).forEach((piece, i) => {
    if (i % 2) {
      const code = document.createElement("code");
      code.textContent = piece.slice(1, -1);
      element.append(code);
    } else if (piece) element.append(piece);
  });
  return element;
}

function codeElement({ language, source }, there) {
  if (there?.block.code) { // it grows: its button stays under the mouse
    there.querySelector("figcaption span").textContent = language || "code"; // comes in pieces, too
    there.querySelector("code").textContent = source;
    return there;
  }
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const name = document.createElement("span");
  const copy = document.createElement("button");
  const pre = document.createElement("pre");
  const code = document.createElement("code");
  name.textContent = language || "code";
  caption.append(name, copy);
  copy.type = "button";
  copy.className = "quiet";
  copy.textContent = "Copy";
  copy.setAttribute("aria-label", "Copy code");
  copy.addEventListener("click", () => copyText(code.textContent, copy));
  code.textContent = source;
  pre.tabIndex = 0; // so that the keyboard can scroll it
  pre.append(code);
  figure.append(caption, pre);
  return figure;
}

/** To the clipboard; `button` says how it went. */
export async function copyText(text, button) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // browsers offer it on https and localhost alone
    const field = document.createElement("textarea");
    field.value = text;
    field.className = "unseen";
    document.body.append(field);
    field.select();
    done = document.execCommand("copy");
    field.remove();
    button.focus();
  }
  const label = button.dataset.label ??= button.textContent;
  button.textContent = done ? "Copied" : "Not copied";
  clearTimeout(button.timer);
  button.timer = setTimeout(() => { button.textContent = label; }, 1500);
}
