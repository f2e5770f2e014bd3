// The page, top to bottom.

const minutes = when => new Date(when).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });

// Whether the run lives. The page of a living one loads itself again while nobody uses it.
function state() {
  const { name, why, until } = run.state, box = h("aside", { class: "state" });
  if (name === "finished") return false;
  const say = text => box.replaceChildren(h("b", {}, name === "stopped" ? "Not finished: " : "Not finished. "), text);
  if (name !== "running") { say(why); return box; }
  let used = Date.now();
  for (const kind of ["pointermove", "pointerdown", "keydown", "scroll"]) addEventListener(kind, () => { used = Date.now(); }, { passive: true });
  const written = `Written at ${minutes(run.written * 1000)}. While the run lives, it writes this page at each evaluation, and the page loads itself again.`;
  const look = () => {
    if (Date.now() > 1000 * until) return say(`${written} A new one is overdue: the run has stopped, or hangs.`);
    say(written);
    setTimeout(() => Date.now() - used > 20000 ? location.reload() : look(), 30000);
  };
  look();
  return box;
}

function headlines({ base, final }) {
  const wanted = [["accuracy", "held-out accuracy", "share"], ["format", "in the asked form", "share"], ["mean_length", "mean tokens", "number"]];
  const asked = final.questions ?? base.questions;
  return h("div", { class: "headlines" }, wanted.filter(([key]) => key in base && key in final).map(([key, says, scale]) => {
    const change = h("strong", {}, h("small", {}, `${number(base[key], scale)} → `), number(final[key], scale));
    return h("div", { class: "headline" }, change, h("span", {}, says, asked && key === "accuracy" ? `, ${asked} questions` : ""));
  }));
}

function comparison() {
  const titles = ["", "n", "before", "", "after", "change"].map((title, i) => h("th", { class: i === 3 ? "wide" : "" }, title));
  const table = rows => h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, titles.map(title => title.cloneNode(true)))), h("tbody", {}, rows)));
  const heading = part => part.title ? [h("tr", { class: "heading" }, h("td", { colspan: 6 }, words(part.title)))] : [];
  const rows = list => run.compared.filter(part => part[list].length).flatMap(part => [...heading(part), ...part[list].map(comparisonRow)]);
  const same = run.compared.reduce((count, part) => count + part.same.length, 0);
  return [table(rows("rows")), same > 0 && h("details", {}, h("summary", {}, `${same} numbers that did not change`), table(rows("same")))];
}

function comparisonRow({ label, says, inner, share, n, before: a, after: b }) {
  const scale = share ? "share" : "number";
  const full = share ? 1 : Math.max(Math.abs(a ?? 0), Math.abs(b ?? 0)) * 1.1 || 1;
  const at = v => `${100 * Math.min(1, Math.max(0, v / full))}%`;
  const rail = h("div", { class: "rail" }), both = a !== null && b !== null;
  if (both) rail.append(h("span", { style: { left: at(Math.min(a, b)), width: `${100 * Math.abs(a - b) / full}%` } }));
  if (a !== null) rail.append(h("i", { class: "before", style: { left: at(a) } }));
  if (b !== null) rail.append(h("i", { style: { left: at(b) } }));
  const points = () => b === a ? "0" : `${b < a ? "−" : "+"}${(100 * Math.abs(b - a)).toFixed(1)}`;
  const change = !both ? "" : share ? points() : signed(b - a);
  return h("tr", {}, h("td", { class: inner ? "inner" : "" }, inner ? label : words(label), says && h("small", {}, says)), h("td", {}, n === null ? "" : String(n)),
    h("td", {}, number(a, scale)), h("td", { class: "wide" }, rail), h("td", {}, number(b, scale)), h("td", {}, change));
}

// What a guard found: once in red at the top, with what to do.
function warned() {
  const times = w => w.steps === 1 ? `step ${w.first}` : `from step ${w.first}, in ${w.steps} steps`;
  return h("aside", { class: "warnings" }, run.warnings.map(w => h("p", {}, h("b", {}, `${words(w.name)} (${times(w)}): `), `${w.says}.`)));
}

// Accuracy with words of reflection and without: over everything, and inside each question.
function reflection() {
  const share = v => number(v, "share"), points = v => `${v < 0 ? "−" : "+"}${(100 * Math.abs(v)).toFixed(1)}`;
  const gain = g => g ? [points(g[0]), h("small", {}, ` (${points(g[1])} … ${points(g[2])})`)] : "–";
  const row = r => h("tr", {}, h("td", { class: "inner" }, `steps ${r.from} – ${r.to}`), h("td", {}, share(r.share)), h("td", {}, share(r.with)),
    h("td", {}, share(r.without)), h("td", {}, gain(r.gain)), h("td", {}, r.gain ? String(r.gain[3]) : "0"));
  const lists = [...new Set(run.reflection.map(r => r.list))];
  const body = lists.map(list => {
    const inside = run.reflection.filter(r => r.list === list);
    const heading = h("td", { colspan: 6 }, list, h("small", {}, ` ${inside[0].words.join(", ")}`));
    return [h("tr", { class: "heading" }, heading), inside.map(row)];
  });
  const titles = ["", "reflect", "right with", "right without", "difference inside a question", "questions"];
  const table = h("table", { class: "reflection" }, h("thead", {}, h("tr", {}, titles.map(title => h("th", {}, title)))), h("tbody", {}, body));
  return h("div", { class: "scroll" }, table);
}

function again() {
  const view = h("div");
  return [h("div", {}, picker("picks", run.questions.map(face), i => view.replaceChildren(through(run.questions[i])))), view];
}

function tokenByToken() {
  const view = h("div"), groups = h("div"), now = { moment: 0, group: 0, mode: "gradient" };
  const shown = () => run.moments[now.moment].groups;
  const draw = () => { hideTip(); view.replaceChildren(groupView(shown()[now.group], now.mode)); };
  const choose = i => { now.group = i; draw(); };
  const pick = () => groups.replaceChildren(picker("picks", shown().map(face), choose, Math.min(now.group, shown().length - 1)));
  const say = text => h("span", {}, text);
  const steps = picker("steps", run.moments.map(m => ({ show: String(m.step) })), i => { now.moment = i; pick(); });
  const every = run.moments.flatMap(m => m.groups.flatMap(g => g.completions));
  const known = Object.keys(MODES).filter(mode => every.some(c => MODES[mode].of(c).some(v => v)));
  const colour = i => { now.mode = known[i]; if (view.firstChild) draw(); };
  const modes = picker("steps", known.map(mode => ({ show: MODES[mode].name })), colour);
  steps.prepend(say("step"));
  modes.prepend(say("colour"));
  return [h("div", { class: "controls" }, steps, known.length > 1 && modes, groups), view];
}

function lede() {
  const s = run.settings, done = run.summary.finished;
  const loop = s.method === "sft" ? "by imitation of documents" : "by GRPO";
  const size = s.method === "sft" ? "" : ` of ${s.prompts} prompts × ${s.group} completions`;
  const length = done ? `${s.steps} steps` : `${run.step} of ${s.steps} steps so far`;
  if (!s.model) return h("p", { class: "lede" }, `${run.step} steps.`);
  return h("p", { class: "lede" }, "How ", h("em", {}, s.model), " learned ", h("em", {}, run.data || s.task), run.data ? ` (${s.task})` : "", s.blind ? " blindfolded" : "",
    ` ${loop}: ${length}${size}, seed ${s.seed}`, run.summary.seconds ? `, in ${duration(run.summary.seconds)}.` : ".");
}

function page() {
  const sections = [];
  const add = (id, short, title, says, ...content) => sections.push({ id, short, content: section(id, title, says, content) });
  if (run.charts.length) {
    add("curves", "Curves", "Curves", "Thin lines are measurements, thick lines their running mean, dots are held-out questions. "
      + "Point at a step to read it in every chart.", charts(run.charts));
  }
  if (Object.keys(run.summary.base).length) {
    add("compared", "Before and after", "Before and after", "Held-out questions, answered greedily, before the first step and "
      + (run.summary.finished ? "after the last. " : "at the latest evaluation. ") + "n is the number of questions. Changes of shares are in points.", comparison());
  }
  if (run.reflection.length) {
    add("reflection", "Reflection", "Does reflection go with right answers?", "Completions that hold a word of a published list, against those that "
      + "do not. Hard questions draw both doubt and mistakes, so the honest comparison is inside a question: its reflecting answers against its "
      + "others, in points, averaged over the questions that got both kinds, with a 95 % interval.", reflection());
  }
  if (run.questions.length) {
    add("again", "The same question", "The same question, again and again", "Held-out questions, answered greedily while the policy "
      + "learns. It never sees an answer to imitate, only the rewards of its own answers.", again());
  }
  if (run.moments.some(m => m.groups.length)) {
    add("tokens", "Token by token", "Where the gradient went", "One question and the whole group of its completions, best first. "
      + "A token’s colour is the weight of its gradient: ratio × advantage × weight. Blue was made more likely, orange less; grey stripes "
      + "were clipped. "
      + "Point at a token, or walk with the arrow keys.", tokenByToken());
  }
  fill(document.getElementById("page"), {}, [
    h("div", { class: "bar" }, h("b", {}, "Glimpse"), h("nav", {}, sections.map(s => h("a", { href: `#${s.id}` }, s.short))), theme()),
    h("h1", {}, run.name), lede(), state(), run.warnings.length > 0 && warned(), headlines(run.summary), ...sections.map(s => s.content),
    run.config && h("details", {}, h("summary", {}, "All settings of this run (config.yaml)"), h("pre", {}, run.config)),
    h("footer", {}, "Written by Glimpse. This page loads nothing and sends nothing.")]);
}

page();
