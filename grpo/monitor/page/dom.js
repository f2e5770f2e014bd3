"use strict";
// Elements from text. Strings become text nodes, never markup, and what can't be seen is made visible.

const INVISIBLE = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, TOWERS = /(\p{M}{3})(\p{M}+)/gu;

function visible(text) {
  const named = c => c === "\n" || c === "\t" ? c : `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
  return String(text).replace(INVISIBLE, named).replace(TOWERS, (_, some, more) => `${some}⟨${[...more].length} more marks⟩`);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, v] of Object.entries(value)) element.style.setProperty(key, v);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : visible(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : visible(child));
  }
  return element;
}

const h = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
const SVG = "http://www.w3.org/2000/svg";
const svg = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

// A share in percent. Only what is all or nothing says so: 0.996 is 99.6 %, not 100 %.
function percent(value) {
  const text = (100 * value).toFixed(Math.abs(value) < 0.0995 && value !== 0 ? 1 : 0);
  if (value > 0.5 && value < 1 && +text === 100) return value < 0.9995 ? `${(100 * value).toFixed(1)} %` : "> 99.9 %";
  return value > 0 && +text === 0 ? "< 0.1 %" : `${text} %`;
}

// Numbers as a person writes them.
function number(value, scale) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (scale === "share") return percent(value);
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 0.001 || size >= 1e5) return value.toExponential(1).replace("e+", "e").replaceAll("-", "−");
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3).replace("-", "−");
}
const short = (value, digits) => String(+value.toPrecision(digits)).replaceAll("-", "−");
const signed = value => value === null || value === undefined ? "–" : (value > 0 ? "+" : "") + number(value);
function duration(seconds) {
  const s = Math.round(seconds);
  if (s < 90) return `${s} s`;
  return s < 5400 ? `${Math.floor(s / 60)} min ${s % 60} s` : `${Math.floor(s / 3600)} h ${Math.floor(s % 3600 / 60)} min`;
}

// One tooltip for the page, kept inside the window.
const tip = document.getElementById("tip");
function showTip(box, ...content) {
  tip.replaceChildren(...content);
  tip.hidden = false;
  const left = Math.min(Math.max(8, box.left), innerWidth - tip.offsetWidth - 8);
  const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - tip.offsetHeight - 8)}px`;
}
const hideTip = () => { tip.hidden = true; };
addEventListener("scroll", hideTip, { passive: true });

// A row of buttons of which one is pressed. draw(i) is called with the chosen one.
function picker(className, faces, draw, start = 0) {
  const buttons = faces.map((face, i) =>
    h("button", { type: "button", class: face.class || "", "aria-label": face.label || null, onclick: () => choose(i) }, face.show));
  const choose = i => { buttons.forEach((b, j) => b.setAttribute("aria-pressed", i === j)); draw(i); };
  queueMicrotask(() => choose(start));
  return h("div", { class: className, role: "group" }, buttons);
}

// What every page has: its data, sections, light and dark.
const run = JSON.parse(document.getElementById("run").textContent);
const section = (id, title, says, ...content) => h("section", { id }, h("h2", {}, title), h("p", { class: "says" }, says), content);

function theme() {
  const set = name => { document.documentElement.dataset.theme = name; };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  set(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => set(dark.matches ? "dark" : "light"));
  const other = () => document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  return h("button", { type: "button", "aria-label": "light or dark", onclick: () => set(other()) }, "◐");
}

const words = name => { const text = name.replaceAll("_", " "); return text[0].toUpperCase() + text.slice(1); };
