// Small multiples in SVG. Pointing at one chart shows the same step in all of them.

const WIDTH = 350, HEIGHT = 168, LEFT = 40, RIGHT = 6, TOP = 8, BOTTOM = 20;
const followers = [];                       // functions (step or null), one a chart

function ticks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 2.5, 5, 10].map(m => m * power).find(m => m >= rough * 0.999);
  const found = [];
  for (let t = Math.ceil(low / size - 1e-9) * size; t <= high + size * 1e-9; t += size) found.push(Math.abs(t) < size * 1e-9 ? 0 : t);
  return found;
}

function yScale(panel) {
  const values = panel.lines.flatMap(line => [...line.y, ...(line.band || []).flat()]);
  let low = Math.min(...values), high = Math.max(...values);
  const y = share => TOP + (1 - share) * (HEIGHT - TOP - BOTTOM);
  const positive = values.filter(v => v > 0);
  if (panel.scale === "log" && positive.length) {
    const from = Math.floor(Math.log10(Math.min(...positive))), to = Math.max(from + 1, Math.ceil(Math.log10(high)));
    const every = Math.ceil((to - from) / 4);
    return { at: v => v > 0 ? y((Math.log10(v) - from) / (to - from)) : null,
             ticks: [...Array(to - from + 1).keys()].filter(i => i % every === 0).map(i => 10 ** (from + i)),
             label: v => v >= 0.01 && v < 1e4 ? short(v, 3) : `1e${Math.round(Math.log10(v))}`.replace("-", "−") };
  }
  if (panel.scale === "share") { low = 0; high = high > 0.25 ? 1 : Math.max(high, 0.01); }
  if (low > 0 && low < 0.35 * high) low = 0;                    // an axis need not start at zero, but if it nearly does it should
  if (high === low) high = low + (Math.abs(low) || 1);
  const marks = ticks(low, high, 4), step = marks[1] - marks[0];
  if (high - marks[marks.length - 1] > 1e-9 * step && panel.scale !== "share") marks.push(marks[marks.length - 1] + step);
  const top = Math.max(high, marks[marks.length - 1]), bottom = Math.min(low, marks[0]);
  const plain = v => Math.abs(v) < 0.001 && v !== 0 ? v.toExponential(0).replaceAll("-", "−") : short(v, 6);
  const label = v => panel.scale === "share" ? `${short(100 * v, 3)} %` : plain(v);
  return { at: v => y((v - bottom) / (top - bottom)), ticks: marks, label };
}

function path(xs, ys, X, Y) {
  let d = "", pen = "M";
  xs.forEach((x, i) => {
    const y = Y(ys[i]);
    if (y === null) { pen = "M"; return; }
    d += `${pen}${X(x).toFixed(1)} ${y.toFixed(1)}`;
    pen = "L";
  });
  return d;
}

function nearestIndex(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) { const mid = (low + high) >> 1; if (xs[mid] < x) low = mid; else high = mid; }
  return x - xs[low] <= xs[high] - x ? low : high;
}

function drawLine(line, colour, X, Y) {
  const stroke = { stroke: colour, fill: "none" };
  if (line.dots) {
    const dot = { fill: colour, stroke: "var(--paper)", "stroke-width": 1.2 };
    return line.x.map((x, i) => Y(line.y[i]) !== null && svg("circle", { cx: X(x), cy: Y(line.y[i]), r: 3.6, style: dot }));
  }
  const thin = { ...stroke, opacity: 0.3, "stroke-width": 0.9 }, thick = { ...stroke, "stroke-width": 1.9, "stroke-linejoin": "round" };
  const curve = (ys, style) => svg("path", { d: path(line.x, ys, X, Y), style });
  const drawn = [curve(line.y, thin), curve(line.smooth, thick)];
  if (line.band) {
    const there = path(line.x, line.band[0], X, Y), back = path([...line.x].reverse(), [...line.band[1]].reverse(), X, Y);
    drawn.unshift(svg("path", { d: `${there}${back.replace("M", "L")}Z`, style: { fill: colour, opacity: 0.1 } }));
  }
  return drawn;
}

function chart(panel, domain) {
  if (panel.zero) return h("figure", { class: "chart" }, h("h3", {}, panel.title), h("p", {}, panel.note), h("p", { class: "zero" }, panel.zero));
  const labels = [...new Set(panel.lines.map(line => line.label))];
  const colour = line => `var(--c${labels.indexOf(line.label) % 8})`;
  const X = x => LEFT + (x - domain[0]) / (domain[1] - domain[0] || 1) * (WIDTH - LEFT - RIGHT);
  const scale = yScale(panel), Y = scale.at, steps = ticks(...domain, 5).filter(Number.isInteger);
  const cross = svg("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${panel.title} by step` },
    scale.ticks.map(t => [svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: Y(t), y2: Y(t) }),
                          svg("text", { class: "axis", x: LEFT - 7, y: Y(t) + 3.5, "text-anchor": "end" }, scale.label(t))]),
    steps.map(t => svg("text", { class: "axis", x: X(t), y: HEIGHT - 4, "text-anchor": "middle" }, String(t))),
    panel.lines.map(line => drawLine(line, colour(line), X, Y)), cross);

  const legend = h("div", { class: "legend" });
  const follow = step => {
    cross.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step !== null) { cross.setAttribute("x1", X(step)); cross.setAttribute("x2", X(step)); }
    const paired = line => line.dots && panel.lines.some(other => other.label === line.label && !other.dots);
    legend.replaceChildren(...panel.lines.filter(line => !paired(line)).map(line => {
      const i = step === null ? line.x.length - 1 : nearestIndex(line.x, step);
      const value = step === null && line.smooth ? line.smooth[i] : line.y[i];
      const key = h("i", { class: line.dots ? "dot" : "", style: { background: colour(line) } });
      return h("span", {}, key, `${line.label} `, h("span", { class: "number" }, number(value, panel.scale)));
    }));
  };
  follow(null);
  followers.push(follow);
  drawing.addEventListener("pointermove", event => {
    const box = drawing.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * WIDTH;
    const step = domain[0] + (x - LEFT) / (WIDTH - LEFT - RIGHT) * (domain[1] - domain[0]);
    const shown = Math.round(Math.min(domain[1], Math.max(domain[0], step)));
    followers.forEach(f => f(shown));
  });
  drawing.addEventListener("pointerleave", () => followers.forEach(f => f(null)));
  return h("figure", { class: "chart" }, h("h3", {}, panel.title), h("p", {}, panel.note), drawing, legend);
}

function charts(panels) {
  const xs = panels.flatMap(panel => panel.lines.flatMap(line => line.x));
  const domain = [xs.reduce((a, b) => Math.min(a, b)), xs.reduce((a, b) => Math.max(a, b))];
  const grid = main => h("div", { class: "charts" }, panels.filter(panel => panel.main === main).map(panel => chart(panel, domain)));
  const hidden = "Under the hood: entropy, waste, clipping, gradient, learning rate, loss, time";
  const hood = h("details", {}, h("summary", {}, hidden), grid(false));
  return [grid(true), panels.some(panel => !panel.main) && hood];
}
