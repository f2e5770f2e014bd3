// Questions with their pictures, and what was said about them: held-out answers through time, groups token by token.

const ramp = (hue, from) => `rgba(var(${hue}), 0) ${from}, rgba(var(${hue}), .75)`;
const MODES = {
  gradient: { name: "gradient", of: c => c.weight, hue: v => v >= 0 ? "--more" : "--less", ends: ["less likely", "more likely"],
              scale: `linear-gradient(90deg, rgba(var(--less), .75), rgba(var(--less), 0) 50%, ${ramp("--more", "50%")})` },
  surprise: { name: "surprise", of: c => c.logp.map(v => v === null ? null : -v), hue: () => "--less", ends: ["certain", "surprising"],
              scale: `linear-gradient(90deg, ${ramp("--less", "0%")})` },
  kl: { name: "KL", of: c => c.kl, hue: () => "--more", ends: ["as the reference", "away from it"],
        scale: `linear-gradient(90deg, ${ramp("--more", "0%")})` },
};

function picture(of) {
  if (!of.picture) return h("div", { class: "none" }, "no picture");
  const image = h("img", { src: of.picture, alt: `Picture of: ${of.question}` });
  image.addEventListener("load", () => image.classList.toggle("photo", image.naturalWidth > 160));    // small ones grow pixel by pixel
  return image;
}

function asked(of) {
  const letter = i => String.fromCharCode(65 + i);
  const choices = of.choices.map((choice, i) => h("li", { class: choice === of.answer ? "right" : "" }, `(${letter(i)})  ${choice}`));
  return h("div", { class: "asked" }, picture(of), h("p", { class: "task" }, of.task || " "), h("p", { class: "question" }, of.question),
    h("ol", {}, choices.length ? choices : h("li", { class: "right" }, of.answer)));
}

function face(of, i) {
  const show = of.picture ? h("img", { src: of.picture, alt: "" }) : h("span", { class: "none" });
  return { class: "pick", label: `Question ${i + 1}: ${of.question.slice(0, 200)}`, show };
}

// Where each token lies in the text. Pieces of a word-level vocabulary carry no spaces, those of a byte-level one do; the text knows.
function laid(c) {
  const text = c.text;
  const wrote = c.tokens.slice(0, 4).join("").trim();                           // <think> may be several pieces of its own making
  const given = text.startsWith("<think>") && !wrote.startsWith("<think>") ? "<think>" : "";
  const spaced = c.tokens.some(t => /\s/.test(t));
  let at = given.length;
  const items = c.tokens.map((token, i) => {
    const gap = text.startsWith(token, at) ? "" : /^\s*/.exec(text.slice(at, at + 64))[0];
    const found = token !== "" && text.startsWith(token, at + gap.length);
    if (found) at += gap.length + token.length;
    const stop = !found && c.stopped && i === c.length - 1;
    return { token, stop, gap: found ? gap : stop || !spaced ? " " : "" };
  });
  return { given, items };
}

// Tags step back, the words stay.
function marked(text) {
  return text.split(/(<\/?(?:think|answer)>)/).map(part => /^<\/?(think|answer)>$/.test(part) ? h("span", { class: "tag" }, part) : part);
}

function isRight(c) { return (c.parts && "accuracy" in c.parts ? c.parts.accuracy : c.reward) > 0; }

function through(of) {
  let before = null;
  const items = of.answers.map((c, i) => {
    const same = before === c.text;
    before = c.text;
    const right = isRight(c), form = c.parts?.format === 0 ? ", not in the asked form" : "";
    const size = `${form} · ${c.length} tokens${c.stopped ? "" : ", cut at the cap"}`;
    return h("li", { class: right ? "right" : "" }, h("span", { class: "when" }, c.step === 0 ? "before" : `step ${c.step}`),
      h("div", { class: "said" }, same ? h("em", { class: "given" }, "the same again") : marked(c.text)),
      h("div", { class: "verdict" }, h("b", {}, right ? "right" : "wrong"), size));
  });
  return h("div", { class: "again" }, asked(of), h("ol", { class: "times" }, items));
}

function tokenTip(c, i, token) {
  const value = (name, shown) => c[name]?.length > i ? shown(c[name][i]) : "–";
  const clipped = c.clipped[i], w = c.weight[i];
  const chance = v => v === null ? "–" : `${number(v)} (p = ${number(Math.exp(v))})`;
  const rows = [["gradient weight", value("weight", signed)], ["log-prob", value("logp", chance)],
    ["KL to the reference", value("kl", v => number(v))], ["token", `${i + 1} of ${c.length}`]];
  const pushed = !w ? "Pushed neither way." : w > 0 ? "Made more likely here." : "Made less likely here.";
  const piece = token === "" ? "(nothing)" : token.replace(/\n/g, "⏎").replace(/ /g, "␣");
  return [h("div", { class: "piece" }, piece), h("dl", {}, rows.map(([k, v]) => [h("dt", {}, k), h("dd", {}, v)])),
    h("p", {}, clipped ? "Clipped: the ratio has left the trust region, so no gradient flows." : pushed)];
}

function tokens(c, mode, most) {
  const { given, items } = laid(c), values = MODES[mode].of(c);
  const label = "a completion; the arrow keys walk through its tokens";
  const box = h("div", { class: "tokens", tabindex: 0, "aria-label": label }, h("span", { class: "given" }, given));
  const spans = items.map(({ token, gap, stop }, i) => {
    const v = values[i], grey = c.clipped[i] && mode === "gradient";
    const strength = v && most ? Math.min(1, Math.abs(v) / most) ** 0.75 * 0.75 : 0;
    const classes = ["t", grey && "clipped", stop && "stop"].filter(Boolean).join(" ");
    const span = h("span", { class: classes }, stop ? "■" : token.replace(/\n/g, "⏎\n"));
    if (strength > 0.012 && !grey) span.style.background = `rgba(var(${MODES[mode].hue(v)}), ${strength.toFixed(3)})`;
    box.append(visible(gap), span);
    return span;
  });
  if (c.length > items.length) box.append(h("span", { class: "given" }, ` … ${c.length - items.length} more tokens not shown`));
  let at = -1;
  const point = i => {
    if (at >= 0) spans[at].classList.remove("at");
    at = i;
    if (i < 0) return hideTip();
    spans[i].classList.add("at");
    showTip(spans[i].getClientRects()[0] || spans[i].getBoundingClientRect(), ...tokenTip(c, i, items[i].token));
  };
  box.addEventListener("pointerover", event => point(spans.indexOf(event.target.closest(".t"))));
  box.addEventListener("pointerleave", () => point(-1));
  box.addEventListener("blur", () => point(-1));
  box.addEventListener("scroll", hideTip);
  box.addEventListener("keydown", event => {
    const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (way && spans.length) { event.preventDefault(); point(Math.min(spans.length - 1, Math.max(0, at + way))); }
    if (event.key === "Escape") point(-1);
  });
  return box;
}

function card(c, mode, most) {
  const advantage = c.advantage === null ? "–" : (c.advantage > 0 ? "+" : "") + c.advantage.toFixed(2).replace("-", "−");
  const parts = Object.entries(c.parts || {}).map(([name, v]) => h("span", {}, `${name} ${v === null ? "–" : +v.toPrecision(3)}`));
  const way = c.advantage > 0 ? "up" : c.advantage < 0 ? "down" : "";
  return h("article", { class: "card" },
    h("header", {}, h("span", { class: `advantage ${way}`, title: "advantage" }, advantage),
      h("span", { class: "reward" }, `reward ${number(c.reward)}`)),
    h("div", { class: "parts" }, parts, h("span", {}, `${c.length} tokens`), !c.stopped && h("span", { class: "cut" }, "cut at the cap")),
    tokens(c, mode, most));
}

// Colours are relative to the group; one token that stands out must not bleach all others.
function strongest(group, mode) {
  const all = group.completions.flatMap(MODES[mode].of).filter(v => v).map(Math.abs).sort((a, b) => a - b);
  return all.length ? all[Math.floor(0.97 * (all.length - 1))] : 0;
}

function remark(group) {
  const rewards = group.completions.map(c => c.reward), mean = rewards.reduce((a, b) => a + b, 0) / rewards.length;
  if (rewards.every(r => r === rewards[0])) {
    return `All ${rewards.length} completions earned ${number(mean)}: none did better than the group, so this group pushes nowhere.`;
  }
  const right = group.completions.filter(isRight).length;
  return `${right} of ${rewards.length} are right. The group earned ${number(mean)} on average; the large number is the advantage: `
    + "how far above or below that.";
}

function groupView(group, mode) {
  const most = strongest(group, mode), m = MODES[mode], signs = mode === "gradient" ? "+" : "";
  const order = [...group.completions].sort((a, b) => (b.advantage ?? 0) - (a.advantage ?? 0));
  const bar = h("i", { style: { background: m.scale } });
  return h("div", { class: "group" }, asked(group), h("div", {}, h("p", { class: "remark" }, remark(group)),
    h("div", { class: "scale" }, h("span", {}, m.ends[0], signs && most ? ` (−${number(most)})` : ""), bar,
      h("span", {}, m.ends[1], most ? ` (${signs}${number(most)})` : ""), signs && [h("i", { class: "box" }), "clipped"]),
    h("div", { class: "cards" }, order.map(c => card(c, mode, most)))));
}
