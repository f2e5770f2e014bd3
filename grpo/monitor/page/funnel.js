// The report of a bridge: what was kept of the chains, and why the rest was not.

const many = value => value.toLocaleString("en-US");
const share = (part, whole) => whole ? percent(part / whole) : "–";
const titled = (titles, rows, name = "") => h("div", { class: "scroll" }, h("table", { class: name },
  h("thead", {}, h("tr", {}, titles.map(title => h("th", { class: title === "|" ? "wide" : "" }, title === "|" ? "" : title)))), h("tbody", {}, rows)));
const cells = values => h("tr", {}, values.map(value => value instanceof Node && value.tagName === "TD" ? value : h("td", {}, value)));

// A bar of a share, from `from` to `to`; the second one is light.
function bar(part, whole, className = "") {
  const width = `${whole ? 100 * part / whole : 0}%`;
  return h("td", { class: "wide" }, h("div", { class: `share ${className}` }, h("span", { style: { width } })));
}

function funnel() {
  const lost = run.reasons.map(r => cells([r.name, many(r.first), bar(r.first, run.asked, "lost"), share(r.first, run.asked), many(r.every)]));
  const whole = cells(["questions", many(run.asked), bar(1, 1), "", ""]);
  const kept = cells([h("b", {}, "kept"), h("b", {}, many(run.kept)), bar(run.kept, run.asked, "kept"), h("b", {}, share(run.kept, run.asked)), ""]);
  return titled(["", "questions", "|", "share", "has this reason"], [whole, lost, kept]);
}

function keptOf(title, rows) {
  const rail = ([low, high], point) => h("td", { class: "wide" }, h("div", { class: "rail" },
    h("span", { style: { left: `${100 * low}%`, width: `${100 * (high - low)}%` } }), h("i", { style: { left: `${100 * point}%` } })));
  return titled([title, "asked", "kept", "|", "share"], rows.map(r =>
    cells([r.name || "(no name)", many(r.asked), many(r.kept), rail(r.interval, r.asked ? r.kept / r.asked : 0), share(r.kept, r.asked)])));
}

// Two bars for each length: chains as they were written, and those that were kept.
function histogram() {
  const wide = 700, high = 190, left = 44, bottom = 22, top = 10, whens = ["before", "after"];
  const used = run.edges.map((_, i) => i).filter(i => whens.some(when => run.lengths[when][i] > 0));
  if (!used.length) return h("p", { class: "remark" }, "There is no chain yet.");
  const bars = run.edges.map((_, i) => i).slice(Math.min(...used), Math.max(...used) + 1);
  const most = Math.max(...whens.flatMap(when => run.lengths[when]));
  const step = Math.min(110, (wide - left) / bars.length), y = count => top + (1 - count / most) * (high - top - bottom);
  const drawn = bars.flatMap((bin, at) => whens.map((when, k) => {
    const count = run.lengths[when][bin], x = left + at * step + step * (0.14 + 0.36 * k);
    const says = svg("title", {}, `${when === "before" ? "written" : "kept"}, ${run.edges[bin]} words and more: ${many(count)}`);
    return svg("rect", { x, y: y(count), width: step * 0.36, height: high - bottom - y(count), style: { fill: `var(--${k ? "right" : "faint"})` } }, says);
  }));
  const labels = bars.map((bin, at) => svg("text", { class: "axis", x: left + at * step + step / 2, y: high - 6, "text-anchor": "middle" },
    bin + 1 < run.edges.length ? `${run.edges[bin]}–${run.edges[bin + 1] - 1}` : `${run.edges[bin]}–`));
  const marks = [0, 0.5, 1].map(part => [svg("line", { class: "grid", x1: left, x2: wide, y1: y(part * most), y2: y(part * most) }),
    svg("text", { class: "axis", x: left - 7, y: y(part * most) + 3.5, "text-anchor": "end" }, many(Math.round(part * most)))]);
  const key = (name, colour) => h("span", {}, h("i", { style: { background: `var(--${colour})` } }), name);
  return h("figure", { class: "chart histogram" }, svg("svg", { viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": "chains by their number of words" }, marks, drawn, labels),
    h("div", { class: "legend" }, key(`written (${many(run.documents.before)})`, "faint"), key(`kept (${many(run.documents.after)})`, "right")));
}

function tableOfWords(when) {
  const title = `${when === "before" ? "Written" : "Kept"}: ${many(run.documents[when])} chains`;
  return [h("tr", { class: "heading" }, h("td", { colspan: run.word_titles.length }, title)), run.words[when].map(cells)];
}

// One question with what the stages wrote about it.
function story(of) {
  const part = (title, text) => text && [h("h4", {}, title), h("div", { class: "said" }, text)];
  const errors = Object.entries(of.errors).map(([stage, text]) => part(`Error of ${stage}`, text));
  const why = of.why.length ? h("p", { class: "parts" }, h("span", { class: "cut" }, of.why.join(", "))) : h("p", { class: "parts" }, "kept");
  return h("div", { class: "group" }, asked(of), h("div", { class: "story" }, why, part("Pseudo-chain", of.earlier.pseudo), part("Description", of.earlier.describe), part("Chain", of.chain),
    part("Answer", of.said), errors));
}

function examples() {
  const names = Object.keys(run.examples), view = h("div");
  const draw = i => view.replaceChildren(...run.examples[names[i]].map(story));
  const faces = names.map(name => ({ show: `${name} ${many(name === "kept" ? run.kept : run.reasons.find(r => r.name === name).every)}` }));
  return [h("div", { class: "controls" }, picker("steps", faces, draw)), view];
}

const total = key => run.stages.reduce((sum, s) => sum + s[key], 0);

function costs() {
  const money = value => value ? value.toFixed(2) : "–";
  const row = s => cells([[s.stage, h("small", {}, s.model)], many(s.questions), many(s.replies), many(s.tokens_in), many(s.tokens_out), duration(s.seconds), money(s.money), many(s.parked)]);
  const sum = { stage: "all", model: "", ...Object.fromEntries(["questions", "replies", "tokens_in", "tokens_out", "seconds", "money", "parked"].map(key => [key, total(key)])) };
  return titled(["", "questions", "replies", "tokens read", "tokens written", "time of replies", "money", "parked"], [...run.stages, sum].map(row), "costs");
}

function page() {
  const sections = [];
  const add = (id, short, title, says, ...content) => sections.push({ id, short, content: section(id, title, says, content) });
  add("funnel", "Funnel", "What was kept", "A question counts at the first reason against its chain, in this order. The last column counts every question that "
    + "has the reason, also behind another one.", funnel());
  if (Object.keys(run.examples).length) {
    add("examples", "Examples", "Examples", "Up to three questions for each reason: the picture, what was read from it, and what was thought about it. "
      + "The chain is shown after the clean-up.", examples());
  }
  add("shares", "By task", "What was kept, by task and by kind of answer", "A filter on right answers drops what is hard. The bar is a 95 % interval.",
    keptOf("task", run.tasks), keptOf("kind of answer", run.kinds));
  add("lengths", "Lengths", "Lengths", "Chains by their number of words, as they were written and as they were kept.", histogram());
  add("words", "Words", "Words of reflection", "The words of Vision-R1’s Table 4, in all chains that were written and in those that were kept.",
    titled(run.word_titles, ["before", "after"].map(tableOfWords)));
  if (run.replaced.length) {
    add("cleanup", "Clean-up", "Clean-up", "Phrases about the text that were replaced in the kept chains.",
      titled(["phrase", "times"], run.replaced.map(([name, count]) => cells([name, many(count)]))));
  }
  add("costs", "Costs", "Costs", "All replies that are stored, those of later attempts too. Time is the sum over replies; several are written at once.", costs());
  const prompts = Object.entries(run.prompts).map(([stage, text]) => h("details", {}, h("summary", {}, `Prompt of ${stage}`), h("pre", {}, text)));
  const headline = (value, says) => h("div", { class: "headline" }, h("strong", {}, value), h("span", {}, says));
  const left = run.left_out ? `; ${many(run.left_out)} more could not be used` : "";
  fill(document.getElementById("page"), {}, [
    h("div", { class: "bar" }, h("b", {}, "Glimpse"), h("nav", {}, sections.map(s => h("a", { href: `#${s.id}` }, s.short))), theme()),
    h("h1", {}, run.name),
    h("p", { class: "lede" }, "How ", h("em", {}, many(run.asked)), ` questions of `, h("em", {}, run.data || run.task), " became ", h("em", {}, many(run.kept)), ` chains of thought${left}.`),
    h("div", { class: "headlines" }, headline(share(run.kept, run.asked), "kept"), headline(many(run.kept), "chains"),
      headline(many(total("replies")), "replies"), total("money") > 0 && headline(total("money").toFixed(2), "money")),
    ...sections.map(s => s.content), ...prompts,
    h("details", {}, h("summary", {}, "All settings, and versions"), h("pre", {}, run.settings), h("pre", {}, Object.entries(run.versions).map(pair => pair.join(" ")).join("\n"))),
    h("footer", {}, "Written by Glimpse. This page loads nothing and sends nothing.")]);
}

page();
