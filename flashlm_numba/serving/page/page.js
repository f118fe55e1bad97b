// The page of `flashlm-numba serve`: it writes, scores and explains with the server's own interface.
"use strict";

const $ = (id) => document.getElementById(id);
const LEVELS = [1, 2, 4, 8, 12]; // bits from which a token has the next colour
const MOST_CURVES = 6;
const REFRESH = 3000; // milliseconds between two looks at the runs

/** An element with attributes and children; texts become text nodes, never HTML. */
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "rect", "path", "polygon", "line", "text", "circle", "g", "clipPath"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const whole = (number) => number.toLocaleString("en");

function percent(p) {
  const value = 100 * p;
  if (value === 0 || value === 100) return `${value}\u00a0%`;
  if (value >= 99.95) return ">99.9\u00a0%";
  if (value >= 10) return `${value.toFixed(1)}\u00a0%`;
  if (value >= 0.001) return `${value >= 1 ? value.toFixed(1) : Number(value.toPrecision(2))}\u00a0%`;
  return `${value.toExponential(1)}\u00a0%`;
}

const plural = (count, noun) => `${whole(count)} ${noun}${count === 1 ? "" : "s"}`;

/** The name of a token with its white space visible. */
const visible = (name) => name.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍");

// --- the server ---

const ABORTED = Symbol("aborted");

/** A response of the server. Throws an Error whose message is a sentence, or ABORTED. */
async function request(path, options = {}) {
  for (;;) {
    const headers = { ...options.headers };
    const key = sessionStorage.getItem("key");
    // a header has bytes, not characters
    if (key) headers.Authorization = "Bearer " + String.fromCharCode(...new TextEncoder().encode(key));
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw ABORTED;
      throw new Error("The server does not answer. Is it still running?");
    }
    if (response.ok) return response;
    let message = `The server answered with status ${response.status}.`;
    try {
      message = (await response.json()).error.message;
    } catch {
      // no JSON: a proxy's answer
    }
    if (response.status !== 401 || !(await askKey())) throw new Error(message);
  }
}

const post = (path, body, signal) =>
  request(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });

let asking = null; // one dialog for all requests that wait for a key

/** Ask for the key. Resolves to whether there is one to try. */
function askKey() {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    const end = (found) => {
      asking = null;
      dialog.close();
      resolve(found);
    };
    $("key").value = "";
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem("key", $("key").value.trim());
      end(true);
    };
    $("key-cancel").onclick = () => end(false);
    dialog.oncancel = () => end(false);
    dialog.showModal();
  });
  return asking;
}

/** The objects of an event stream. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    let found;
    try {
      found = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw ABORTED;
      found = { done: true };
    }
    if (found.done) throw new Error("The answer broke off. Is the server still running?");
    buffer += found.value;
    for (let end; (end = buffer.indexOf("\n\n")) >= 0; buffer = buffer.slice(end + 2)) {
      const data = buffer.slice(0, end).replace(/^data: /, "");
      if (data === "[DONE]") return;
      const object = JSON.parse(data);
      if (object.error) throw new Error(object.error.message);
      yield object;
    }
  }
}

function tell(error) {
  if (error === ABORTED) return;
  $("error").textContent = error ? error.message : "";
  if (error) $("error").scrollIntoView({ block: "nearest" });
}

// --- tokens that can be touched ---

/** The tokens of a text in an element: a listbox of which one token has the focus. */
class Tokens {
  constructor(element) {
    this.element = element;
    element.addEventListener("click", (event) => {
      const at = this.index(event.target);
      if (at >= 0) this.choose(at);
    });
    element.addEventListener("keydown", (event) => this.onKey(event));
    this.clear();
  }

  /** Forget the text. promptLength : characters at its beginning that were given */
  clear(promptLength = 0) {
    this.element.replaceChildren();
    this.characters = []; // code points, as the server counts them
    this.names = [];
    this.offsets = [];
    this.promptLength = promptLength;
    this.sampled = 0; // tokens that are not of the prompt
    this.current = 0;
  }

  /** Add text, and the tokens that begin in it. */
  add(text, scores) {
    this.characters.push(...text);
    const first = this.names.length;
    const fresh = document.createDocumentFragment();
    scores.tokens.forEach((name, i) => {
      this.names.push(name);
      this.offsets.push(scores.text_offset[i]);
      const bits = -(scores.token_logprobs[i] ?? 0) / Math.LN2;
      const level = LEVELS.filter((least) => bits >= least).length;
      const element = make("span", { role: "option", tabindex: "-1", "aria-selected": "false", class: `s${level}` });
      if (scores.text_offset[i] + Array.from(name).length <= this.promptLength) element.classList.add("prompt");
      else this.sampled++;
      fresh.append(element);
    });
    this.element.append(fresh);
    // the token before may have got the rest of its text
    for (let i = Math.max(0, first - 1); i < this.names.length; i++) this.fill(i);
    if (first === 0 && this.names.length) this.element.children[0].tabIndex = 0;
  }

  fill(i) {
    const element = this.element.children[i];
    const text = this.characters.slice(this.offsets[i], this.offsets[i + 1]).join("");
    element.textContent = text;
    element.classList.toggle("break", /^[\r\n]+$/.test(text));
    element.classList.toggle("part", text === "");
    if (text.trim() === "") element.setAttribute("aria-label", visible(this.names[i]));
    else element.removeAttribute("aria-label");
  }

  index(element) {
    return Array.prototype.indexOf.call(this.element.children, element);
  }

  onKey(event) {
    const count = this.names.length;
    if (!count || event.ctrlKey || event.altKey || event.metaKey) return;
    const moves = {
      ArrowRight: () => this.current + 1,
      ArrowLeft: () => this.current - 1,
      ArrowDown: () => this.line(1),
      ArrowUp: () => this.line(-1),
      Home: () => 0,
      End: () => count - 1,
    };
    if (event.key in moves) this.focus(Math.min(count - 1, Math.max(0, moves[event.key]())));
    else if (event.key === "Enter" || event.key === " ") this.choose(this.current);
    else return;
    event.preventDefault();
  }

  /** The token in the next line, or the one before, that is nearest below or above. */
  line(direction) {
    const boxes = (i) => this.element.children[i].getBoundingClientRect();
    const here = boxes(this.current);
    let best = this.current;
    let distance = Infinity;
    for (let i = this.current + direction; i >= 0 && i < this.names.length; i += direction) {
      const box = boxes(i);
      const lines = Math.round(((box.top - here.top) * direction) / here.height);
      if (lines > 1 && distance < Infinity) break;
      if (lines >= 1 && Math.abs(box.left - here.left) < distance) {
        best = i;
        distance = Math.abs(box.left - here.left);
      }
    }
    return best;
  }

  focus(i) {
    const children = this.element.children;
    children[this.current].tabIndex = -1;
    this.current = i;
    children[i].tabIndex = 0;
    children[i].focus();
  }

  choose(i) {
    this.focus(i);
    for (const other of this.element.querySelectorAll('[aria-selected="true"]')) other.ariaSelected = "false";
    this.element.children[i].ariaSelected = "true";
    inspect(this.names.slice(0, i + 1));
  }
}

// --- one token ---

let inspecting = null;

async function inspect(names) {
  inspecting?.abort();
  const mine = (inspecting = new AbortController());
  try {
    const response = await post("inspect", { tokens: names }, mine.signal);
    const found = await response.json();
    if (mine.signal.aborted) return;
    tell(null);
    $("token-hint").hidden = true;
    $("token-name").replaceChildren("Token ", code(found.token.name));
    const bits = -found.token.log_prob / Math.LN2;
    $("token-status").textContent = `Probability ${percent(found.token.probability)}, a surprise of ${bits.toFixed(1)} bits.`;
    $("token-body").replaceChildren(...described(found));
    if (innerWidth < 960) $("token").scrollIntoView({ block: "start" });
  } catch (error) {
    if (!mine.signal.aborted) tell(error);
  }
}

function clearToken() {
  inspecting?.abort();
  for (const id of ["token-name", "token-status", "token-body"]) $(id).replaceChildren();
  $("token-hint").hidden = false;
}

/** A probability in a list, with a bar whose full length is the largest one of the list. */
function bar(p, largest, label, chosen) {
  const inner = make("div");
  inner.style.width = `${(100 * p) / largest}%`;
  return make(
    "li",
    chosen ? { class: "chosen", "aria-current": "true" } : {},
    make("span", { class: "number" }, percent(p)),
    make("div", { class: "bar", "aria-hidden": "true" }, inner),
    label,
  );
}

const code = (name) => make("code", {}, visible(name));

function described({ token, likeliest, parts, head, path }) {
  const largest = likeliest[0].probability || 1;
  const rows = likeliest.map((other) => bar(other.probability, largest, code(other.name), other.id === token.id));
  const listed = likeliest.some((other) => other.id === token.id);
  if (!listed) rows.push(bar(token.probability, largest, code(token.name), true));
  const found = [
    make("h3", {}, `The ${likeliest.length} likeliest here${listed ? "" : ", and this token"}`),
    make("ol", { class: "bars" }, ...rows),
  ];
  if (parts.length > 1) found.push(...mixture(parts, token, head));
  if (path) found.push(...treePath(path, token, parts));
  return found;
}

function mixture(parts, token, head) {
  const names = {
    head: head === "tree" ? "tree" : "head",
    copies: "copies of what followed the same words earlier",
    memory: "counted n-grams",
  };
  const rows = parts.map(({ name, share, probability }) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, names[name] ?? name),
      make("td", {}, percent(share)),
      make("td", {}, percent(probability)),
      make("td", {}, percent(share * probability)),
    ),
  );
  const heads = ["Part", "Share", "Alone", "Adds"].map((text) => make("th", { scope: "col" }, text));
  return [
    make("h3", {}, `The mixture: ${percent(token.probability)}`),
    make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows)),
  ];
}

function treePath(path, token, parts) {
  const product = path.map((node) => percent(node.probability)).join(" × ");
  const own = path.reduce((p, node) => p * node.probability, 1);
  const items = path.map((node, level) => {
    const kinds = [node.tokens && plural(node.tokens, "token"), node.nodes && plural(node.nodes, "node")];
    const label = level ? `Level ${level + 1}, node ${whole(node.node)}` : "Root";
    return make(
      "li",
      {},
      make("p", {}, make("strong", {}, label), ` decides between ${kinds.filter(Boolean).join(" and ")}.`),
      make("p", { class: "muted" }, `The path takes the child of rank ${whole(node.rank)}.`),
      make("ol", { class: "bars" }, ...node.children.map((child) => childRow(child, node.children[0].probability || 1))),
    );
  });
  return [
    make("h3", {}, "The path through the tree"),
    drawing(path),
    make(
      "p",
      { class: "muted" },
      "Each row is one softmax, divided by probability. The blue child opens into the next row; in the last row it is the token.",
    ),
    make("p", { id: "product" }, `${product}${path.length > 1 ? ` = ${percent(own)}` : ""}${parts.length > 1 ? " by the tree alone" : ""}`),
    make("ol", { class: "path" }, ...items),
  ];
}

function childRow(child, largest) {
  if ("token" in child) return bar(child.probability, largest, code(child.token), child.chosen);
  const examples = child.examples.flatMap((name) => [" ", code(name)]);
  const more = child.tokens > child.examples.length ? " …" : "";
  const label = make("span", {}, `node of ${plural(child.tokens, "token")}:`, ...examples, more);
  return bar(child.probability, largest, label, child.chosen);
}

/** The softmaxes of a path as rows of a drawing, each of which is what the chosen child of the row above opens into. */
function drawing(path) {
  const [width, height, gap] = [400, 22, 20];
  const total = path.length * (height + gap) - gap;
  const svg = make("svg", { id: "tree", viewBox: `0 0 ${width} ${total}`, role: "img" });
  svg.setAttribute("aria-label", path.map((node, i) => `${i ? "then" : "root:"} ${percent(node.probability)}`).join(", "));
  path.forEach((node, level) => {
    const y = level * (height + gap);
    let x = 0;
    for (const child of node.children) {
      const wide = child.chosen ? Math.max(2, child.probability * width) : child.probability * width;
      const kind = child.chosen ? "chosen" : "child";
      const from = Math.min(x, width - wide);
      svg.append(make("rect", { class: kind, x: from, y, width: wide, height, "stroke-width": wide > 3 ? 1 : 0 }));
      if (child.chosen && level + 1 < path.length) {
        const [top, bottom] = [y + height, y + height + gap];
        svg.append(make("polygon", { class: "opens", points: `${from},${top} ${from + wide},${top} ${width},${bottom} 0,${bottom}` }));
      }
      x += wide;
    }
    if (x < width) svg.append(make("rect", { class: "rest", x, y, width: width - x, height }));
  });
  return svg;
}

// --- writing ---

const written = new Tokens($("written"));
let writing = null;

function knobs() {
  const values = {};
  for (const [id, name] of [["max-tokens", "max_tokens"], ["temperature", "temperature"], ["top-k", "top_k"], ["top-p", "top_p"], ["seed", "seed"]])
    if ($(id).value !== "") values[name] = Number($(id).value);
  if ($("stop-text").value !== "") values.stop = $("stop-text").value;
  values.seed ??= Math.floor(Math.random() * 2 ** 31); // told below, so that the text can be had again
  return values;
}

/** Disable a button and enable another, which takes the focus over. */
function swap(from, to) {
  $(to).disabled = false;
  if (document.activeElement === $(from)) $(to).focus();
  $(from).disabled = true;
}

async function write() {
  tell(null);
  clearToken();
  const prompt = $("prompt").value;
  const values = knobs();
  const mine = (writing = new AbortController());
  written.clear(Array.from(prompt).length);
  swap("start", "stop");
  $("write-status").textContent = "Writing …";
  $("rate").textContent = "";
  let began = null;
  let before = 0; // tokens that came with the first event
  const rate = (tokens) => {
    const seconds = (performance.now() - began) / 1000;
    return seconds > 0 && tokens > before ? `${whole(Math.round((tokens - before) / seconds))} tokens/s` : "";
  };
  let end = "Stopped";
  try {
    const body = { prompt, ...values, stream: true, stream_options: { include_usage: true }, echo: true, logprobs: 0 };
    const response = await post("v1/completions", body, mine.signal);
    for await (const { choices, usage } of events(response)) {
      for (const choice of choices) {
        written.add(choice.text, choice.logprobs);
        if (began === null) {
          began = performance.now();
          before = written.sampled;
        }
        $("rate").textContent = rate(written.sampled);
        if (choice.finish_reason) end = choice.finish_reason === "stop" ? "Ended by the model or the stop text" : "Written";
      }
      if (usage) $("rate").textContent = rate(usage.completion_tokens);
    }
  } catch (error) {
    if (error !== ABORTED) {
      end = "Not complete";
      tell(error);
    }
  }
  if (writing !== mine) return;
  writing = null;
  swap("stop", "start");
  $("write-status").textContent = `${end}: ${plural(written.sampled, "token")} with seed ${values.seed}.`;
}

$("write-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (writing === null) write();
});
$("stop").addEventListener("click", () => writing?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("write-form").requestSubmit();
});

// --- scoring ---

const scored = new Tokens($("scored"));
let scoring = false;

$("score-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (scoring) return;
  tell(null);
  clearToken();
  scored.clear();
  $("legend").hidden = true;
  const text = $("given").value;
  if (text === "") {
    $("score-status").textContent = "Paste a text to score.";
    return;
  }
  scoring = true;
  $("score-status").textContent = "Scoring …";
  try {
    const response = await post("v1/completions", { prompt: text, echo: true, max_tokens: 0, logprobs: 0 });
    const choice = (await response.json()).choices[0];
    const nats = -choice.logprobs.token_logprobs.reduce((sum, value) => sum + (value ?? 0), 0);
    const [tokens, bytes] = [choice.logprobs.tokens.length, new TextEncoder().encode(text).length];
    scored.add(choice.text, choice.logprobs);
    $("legend").hidden = false;
    $("score-status").replaceChildren(
      make("strong", {}, `${(nats / Math.LN2 / bytes).toFixed(3)} bits per byte`),
      `: ${(nats / tokens).toFixed(3)} nats per token, ${plural(tokens, "token")}, ${plural(bytes, "byte")}.`,
    );
  } catch (error) {
    $("score-status").textContent = "";
    tell(error);
  }
  scoring = false;
});

// --- runs ---

const runs = new Map(); // by name: whether its curve is shown, its points, the lines read so far
let watching = null;
let listed = []; // the runs as the server listed them last
let refreshing = false;
let again = false; // whether something was chosen meanwhile

async function json(path) {
  return (await request(path)).json();
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** Read what a run has logged since the last time. */
async function follow(name, run) {
  for (let more = true; more; ) {
    const found = await json(`runs/${encodeURIComponent(name)}/metrics?after=${run.next}`);
    if (found.next < run.next) {
      run.points = [];
      run.next = 0; // the log was cut
      continue;
    }
    for (const line of found.lines) {
      if (!isNumber(line.step)) continue;
      while (run.points.length && run.points.at(-1).step >= line.step) run.points.pop();
      run.points.push({
        step: line.step,
        minutes: isNumber(line.seconds) ? line.seconds / 60 : null,
        nll: isNumber(line.nll) ? line.nll : isNumber(line.loss) ? line.loss : null,
        validation: isNumber(line.val_nll) ? line.val_nll : null,
      });
    }
    run.next = found.next;
    more = found.more;
  }
}

async function refresh() {
  again = refreshing;
  if (refreshing) return;
  refreshing = true;
  try {
    const answer = await json("runs");
    const list = (listed = answer.runs ?? []);
    const names = new Set(list.map((run) => run.name));
    for (const name of runs.keys()) if (!names.has(name)) runs.delete(name);
    for (const { name } of list)
      if (!runs.has(name)) runs.set(name, { shown: [...runs.values()].filter((run) => run.shown).length < 4, points: [], next: 0, colour: null });
    colours();
    table(list);
    for (const [name, run] of runs) if (run.shown) await follow(name, run);
    chart();
    const older = answer.left_out ? ` ${plural(answer.left_out, "older run")} not listed.` : "";
    $("runs-status").textContent = list.length ? `Read at ${new Date().toLocaleTimeString()}.${older}` : "The folder holds no run yet.";
    tell(null);
  } catch (error) {
    tell(error);
  }
  refreshing = false;
  if (again) refresh();
}

/** Give the runs that are shown a colour of their own; the others lose theirs. */
function colours() {
  const free = new Set(Array.from({ length: MOST_CURVES }, (_, i) => i));
  for (const run of runs.values()) {
    if (!run.shown) run.colour = null;
    free.delete(run.colour);
  }
  for (const run of runs.values()) {
    if (run.shown && run.colour === null) {
      run.colour = free.values().next().value ?? null;
      free.delete(run.colour);
      if (run.colour === null) run.shown = false;
    }
  }
}

function state(run) {
  if (run.training) return run.steps ? `training, ${Math.floor((100 * (run.step ?? 0)) / run.steps)} %` : "training";
  if (run.steps && run.step >= run.steps) return "done";
  if (run.training === null && run.seconds_ago < 60) return `written ${Math.round(run.seconds_ago)} s ago`;
  return "stopped";
}

/** The row of a run, made once, so that a refresh takes neither the focus nor a click away. */
function rowOf(name, own) {
  if (!own.row) {
    const box = make("input", { type: "checkbox" });
    box.addEventListener("change", () => {
      own.shown = box.checked;
      colours();
      table(listed);
      chart();
      refresh();
    });
    const line = make("line", { x1: 0, x2: 32, y1: 6, y2: 6, "stroke-width": 3 });
    const swatch = make("svg", { class: "swatch", viewBox: "0 0 32 11", "aria-hidden": "true" }, line);
    const cells = [0, 1, 2, 3].map(() => make("td"));
    own.row = make("tr", {}, make("td", {}, make("label", {}, box, ` ${name} `, swatch)), ...cells);
    Object.assign(own, { box, line, cells });
  }
  return own.row;
}

function table(list) {
  const body = $("runs-table").tBodies[0];
  const shown = (value, digits) => (isNumber(value) ? value.toFixed(digits) : "–");
  const full = [...runs.values()].filter((run) => run.shown).length >= MOST_CURVES;
  const rows = list.map((run) => rowOf(run.name, runs.get(run.name)));
  if (rows.length !== body.rows.length || rows.some((row, i) => row !== body.rows[i])) body.replaceChildren(...rows);
  for (const run of list) {
    const own = runs.get(run.name);
    own.box.checked = own.shown;
    own.box.disabled = full && !own.shown;
    own.line.setAttribute("class", own.colour === null ? "" : `c${own.colour}`);
    const texts = [isNumber(run.step) ? whole(run.step) : "–", shown(run.nll ?? run.loss, 3), shown(run.val_nll, 3), state(run)];
    texts.forEach((text, i) => (own.cells[i].textContent = text));
  }
}

/** Round numbers between two numbers. */
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return { found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

/** The means of points [x, y] in `count` equal intervals of x. */
function means(points, count) {
  if (points.length <= count) return points;
  const [low, high] = [points[0][0], points.at(-1)[0]];
  const sums = new Map();
  for (const [x, y] of points) {
    const bin = Math.min(count - 1, Math.floor(((x - low) / (high - low || 1)) * count));
    const sum = sums.get(bin) ?? [0, 0, 0];
    sums.set(bin, [sum[0] + x, sum[1] + y, sum[2] + 1]);
  }
  return [...sums.values()].map(([x, y, n]) => [x / n, y / n]);
}

function chart() {
  const svg = $("chart");
  const axis = document.querySelector('input[name="axis"]:checked').value;
  const { width, height } = svg.getBoundingClientRect();
  svg.replaceChildren();
  if (!width) return;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const series = [...runs].filter(([, run]) => run.shown && run.colour !== null).map(([name, run]) => {
    const of = (key) => run.points.filter((p) => isNumber(p[axis]) && isNumber(p[key])).map((p) => [p[axis], p[key]]);
    return { name, colour: run.colour, line: of("nll"), validation: of("validation") };
  });
  const xs = series.flatMap((one) => [...one.line, ...one.validation].map(([x]) => x));
  if (!xs.length) {
    svg.setAttribute("aria-label", "No curves yet");
    svg.append(make("text", { x: 8, y: 20 }, "No curves yet"));
    return;
  }
  const [x0, x1] = [0, xs.reduce((a, b) => Math.max(a, b), 0) || 1];
  // a mean for every few pixels of a curve's own length
  for (const one of series) one.line = means(one.line, Math.max(20, Math.floor(((one.line.at(-1)?.[0] ?? 0) / x1) * (width / 3))));
  const ys = series.flatMap((one) => [...one.line, ...one.validation].map(([, y]) => y)).sort((a, b) => a - b);
  // the first steps of a long run are far above the rest: they leave the chart at its top
  let [y0, y1] = [ys[0], ys.length > 100 ? ys[Math.floor(0.98 * ys.length)] : ys.at(-1)];
  const margin = (y1 - y0) * 0.05 || 0.5;
  [y0, y1] = [y0 - margin, y1 + margin];
  const [left, right, top, bottom] = [44, 8, 8, 40];
  const px = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
  const py = (y) => height - bottom - ((y - y0) / (y1 - y0)) * (height - top - bottom);
  const vertical = ticks(y0, y1, 6);
  for (const y of vertical.found) {
    svg.append(make("line", { class: "grid", x1: left, x2: width - right, y1: py(y), y2: py(y) }));
    svg.append(make("text", { x: left - 6, y: py(y) + 4, "text-anchor": "end" }, y.toFixed(vertical.digits)));
  }
  const horizontal = ticks(x0, x1, Math.max(2, Math.floor(width / 110)));
  for (const x of horizontal.found)
    svg.append(make("text", { x: Math.min(px(x), width - 20), y: height - bottom + 18, "text-anchor": "middle" }, horizontal.digits ? x.toFixed(horizontal.digits) : whole(x)));
  svg.append(make("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, axis === "step" ? "step" : "minutes of training"));
  const area = make("rect", { x: left, y: top - 4, width: width - left - right + 4, height: height - top - bottom + 8 });
  const inside = make("g", { "clip-path": "url(#area)" });
  svg.append(make("clipPath", { id: "area" }, area), inside);
  for (const one of series) {
    const path = one.line.map(([x, y], i) => `${i ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("");
    // a single step is a dot
    if (path) inside.append(make("path", { class: `curve c${one.colour}`, d: `${path}h0` }));
    for (const [x, y] of one.validation) inside.append(make("circle", { class: `point c${one.colour}`, cx: px(x), cy: py(y), r: 4.5 }));
  }
  const names = series.map((one) => one.name).join(", ");
  svg.setAttribute("aria-label", `NLL against ${axis === "step" ? "steps" : "minutes"}: ${names}. The table below has the last values.`);
}

for (const radio of document.querySelectorAll('input[name="axis"]')) radio.addEventListener("change", chart);
new ResizeObserver(chart).observe($("chart"));

function watch(on) {
  clearInterval(watching);
  watching = on ? setInterval(() => document.visibilityState === "visible" && refresh(), REFRESH) : null;
  if (on) refresh();
}

// --- tabs ---

const tabs = [...document.querySelectorAll('[role="tab"]')];

function open(tab) {
  for (const other of tabs) {
    other.ariaSelected = String(other === tab);
    other.tabIndex = other === tab ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = other !== tab;
  }
  const isRuns = tab.id === "tab-runs";
  $("token").hidden = isRuns;
  clearToken();
  tell(null);
  watch(isRuns);
}

for (const tab of tabs) tab.addEventListener("click", () => open(tab));
$("tabs").addEventListener("keydown", (event) => {
  const here = tabs.filter((tab) => !tab.hidden);
  const at = here.indexOf(document.activeElement);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 }[event.key];
  if (at < 0 || to === undefined) return;
  event.preventDefault();
  const tab = here.at(to % here.length);
  open(tab);
  tab.focus();
});

async function start() {
  try {
    const [models, list] = await Promise.all([json("v1/models"), json("runs")]);
    const model = models.data[0]?.id;
    const titles = [model ?? "Training runs", "flashlm-numba"];
    document.title = titles.join(" – ");
    $("model").textContent = titles[0];
    $("tab-write").hidden = $("tab-score").hidden = model === undefined;
    $("tab-runs").hidden = list.runs === null;
    open(tabs.find((tab) => !tab.hidden));
  } catch (error) {
    tell(error);
  }
}

start();
