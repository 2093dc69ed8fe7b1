// Text that is safe to look at, and small helpers to build elements without parsing markup.
const INVISIBLE = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/gu;

function visible(text) {
  return text.replace(INVISIBLE, (char) => {
    const code = char.codePointAt(0);
    if (code < 0x100) return "\\x" + code.toString(16).padStart(2, "0");
    return code < 0x10000 ? "\\u" + code.toString(16).padStart(4, "0") : "\\U" + code.toString(16).padStart(8, "0");
  });
}

function short(text, limit = 240) {
  const shown = text.trim()
    ? visible(text.length > 4 * limit ? text.slice(0, limit) + "…" + text.slice(-limit) : text)
    : `"${visible(text)}"`;
  if (shown.length <= limit) return shown;
  const tail = limit >> 1;
  return shown.slice(0, limit - tail - 1) + "…" + shown.slice(-tail);
}

function percent(value) {
  if (value > 0 && value < 0.01) return "<1%";
  return Math.floor(value * 100 + 1e-9) + "%";
}

const thousands = (number) => String(number).replace(/\B(?=(\d{3})+$)/g, ",");
const counted = (number, noun) => `${thousands(number)} ${noun}${number === 1 ? "" : "s"}`;
const shapeText = (shape) => (shape === null ? "?" : shape.join("×") || "scalar");

// Ascending numbers as runs in braces: {0…11}, {0, 2, 5…8}, {14 of 0…30}.
function ranges(numbers) {
  const runs = [];
  for (const number of numbers) {
    const last = runs[runs.length - 1];
    if (last && number === last[1] + 1) last[1] = number;
    else runs.push([number, number]);
  }
  if (runs.length > 4) return `{${numbers.length} of ${numbers[0]}…${numbers[numbers.length - 1]}}`;
  return `{${runs.map(([a, b]) => (a === b ? a : `${a}…${b}`)).join(", ")}}`;
}

// h("button.primary", {onclick, "aria-label": …}, child, …): strings become text nodes, never markup.
function h(spec, attributes, ...children) {
  const [tag, ...classes] = spec.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  return fill(element, attributes, children);
}

function svg(tag, attributes, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined && child !== "") element.append(child);
  return element;
}

// Text that breaks after a dot before it breaks anywhere else.
const atDots = (text) => text.split(/(?<=\.)/).flatMap((word, place) => (place ? [h("wbr", null), word] : [word]));

// A key that loses its beginning, not its end, where there is no room; its words that the other side shares are faded.
function keyElement(key, others) {
  const pieces = short(key)
    .split(".")
    .map((word, place) => {
      const text = (place ? "." : "") + word;
      return others && others.has(word) ? h("span.same", null, text) : text;
    });
  return h("span.key", null, h("bdi", { dir: "ltr" }, pieces));
}
