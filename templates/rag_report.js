"use strict";
// Draws the list of queries. All text goes in as text nodes, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PAGE = 200;
  const hasAnswers = data.queries.length > 0 && "status" in data.queries[0];
  const SIGN = { fixed: "▲ fixed", broken: "▼ broken", same: "= same", better: "▲ better", worse: "▼ worse", unknown: "? not known" };
  const ORDER = ["fixed", "better", "broken", "worse", "same", "unknown"];
  const NAMES = { baseline: "Baseline", finetuned: "Fine-tuned" };
  const FAR = 1e9;
  const $ = (id) => document.getElementById(id);

  const el = (tag, attributes, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  };

  const rank = (q, role) => q[role].rank || FAR;
  const change = (q) => (rank(q, "baseline") === rank(q, "finetuned") ? 0 : rank(q, "baseline") - rank(q, "finetuned"));
  const COLUMNS = [
    { id: "query", label: "Query", value: (q) => q.query.toLowerCase() },
    { id: "baseline", label: "Baseline rank", value: (q) => rank(q, "baseline") },
    { id: "finetuned", label: "Fine-tuned rank", value: (q) => rank(q, "finetuned") },
    { id: "change", label: "Rank change", value: change, downFirst: true },
    { id: "retrieval", label: "Retrieval", value: (q) => ORDER.indexOf(q.retrieval) },
  ];
  if (hasAnswers) COLUMNS.push({ id: "answer", label: "Answer", value: (q) => ORDER.indexOf(q.answer) });

  const state = { search: "", retrieval: "all", answer: "all", sort: "order", down: false, shown: PAGE };
  const items = data.queries.map((q, index) => ({
    q, index, row: null, detail: null,
    text: [q.query, ...q.gold, ...["baseline", "finetuned"].map((role) => q[role].answer || "")].join("\n").toLowerCase(),
  }));
  let visible = items;

  // ---------------------------------------------------------------- one query

  const rankText = (r) => (r ? String(r) : "not found");
  const changeText = (q) => {
    const { baseline: b, finetuned: f } = q;
    if (b.rank === f.rank) return "=";
    if (!b.rank) return "▲ found";
    if (!f.rank) return "▼ lost";
    return (b.rank > f.rank ? "▲ " : "▼ ") + Math.abs(b.rank - f.rank);
  };
  const tone = (n) => (n > 0 ? "up" : n < 0 ? "down" : "even");

  const buildRow = (item) => {
    const { q, index } = item;
    const button = el("button", { type: "button", class: "open", "aria-expanded": "false" }, el("span", {}, q.query));
    const cell = (label, text, kind) => el("td", { role: "cell", "data-label": label, class: kind }, text);
    const problem = hasAnswers && q.status !== "ok" && q.answer === "unknown";
    item.row = el("tr", { role: "row", class: "query" },
      el("th", { role: "rowheader", scope: "row" }, button),
      cell("Baseline rank", rankText(q.baseline.rank), "number"),
      cell("Fine-tuned rank", rankText(q.finetuned.rank), "number"),
      cell("Rank change", changeText(q), "number " + tone(change(q))),
      el("td", { role: "cell", "data-label": "Retrieval" }, el("span", { class: "chip " + q.retrieval }, SIGN[q.retrieval])),
      hasAnswers ? el("td", { role: "cell", "data-label": "Answer" }, el("span", { class: "chip " + q.answer, title: problem ? q.status : null }, SIGN[q.answer])) : null);
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") === "false";
      if (open && !item.detail) {
        item.detail = el("tr", { role: "row", class: "detail", id: "detail-" + index }, el("td", { role: "cell", colspan: COLUMNS.length }, detailOf(q)));
        button.setAttribute("aria-controls", "detail-" + index);
      }
      button.setAttribute("aria-expanded", String(open));
      if (open) item.row.after(item.detail);
      else item.detail.remove();
    });
    return item.row;
  };

  const longText = (text, limit) => {
    if (text.length <= limit) return el("p", { class: "text" }, text);
    const short = text.slice(0, text.lastIndexOf(" ", limit) > limit / 2 ? text.lastIndexOf(" ", limit) : limit) + " …";
    const body = document.createTextNode(short);
    const button = el("button", { type: "button", class: "link", "aria-expanded": "false" }, "more");
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") === "false";
      body.data = open ? text : short;
      button.textContent = open ? "less" : "more";
      button.setAttribute("aria-expanded", String(open));
    });
    return el("p", { class: "text" }, body, " ", button);
  };

  const documentOf = (q, role, [id, cosine], place) => {
    const other = role === "baseline" ? "finetuned" : "baseline";
    const there = q[other].top.findIndex(([d]) => d === id) + 1;
    const gain = !there ? (role === "finetuned" ? 1 : -1) : role === "finetuned" ? there - place : place - there;
    const moved = role === "finetuned"
      ? (there ? (there === place ? "=" : (gain > 0 ? "▲" : "▼") + " was " + there) : "▲ new")
      : (there ? (there === place ? "=" : (gain > 0 ? "▲" : "▼") + " now " + there) : "▼ gone");
    const [title, text] = data.documents[id];
    return el("li", { class: q.gold.includes(id) ? "gold" : null, value: place },
      el("div", { class: "meta" },
        el("span", { class: "place" }, String(place)),
        q.gold.includes(id) ? el("span", { class: "badge" }, "★ gold") : null,
        el("code", {}, id), el("span", {}, cosine.toFixed(3)),
        el("span", { class: tone(gain) }, moved)),
      title ? el("p", { class: "title" }, title) : null, longText(text, 280));
  };

  const answerOf = (q, role) => {
    const cited = q[role].cites.map((d) => d + (q.gold.includes(d) ? " ★" : "")).join(", ");
    return el("div", { class: "answer" },
      el("p", { class: "text pre" }, q[role].answer || "no answer"),
      el("p", { class: "fine" }, (cited ? "names " + cited : "names no document") + " · context of about " + q[role].tokens + " tokens"));
  };

  const columnOf = (q, role) => {
    const k = data.context_k, top = q[role].top;
    const list = (from, to) => el("ol", { class: "documents", start: from + 1 },
      ...top.slice(from, to).map((entry, i) => documentOf(q, role, entry, from + i + 1)));
    const column = el("section", { class: "side " + role, "aria-label": NAMES[role] }, el("h3", {}, NAMES[role]));
    if (hasAnswers && !q.shared) column.append(answerOf(q, role));
    column.append(el("h4", {}, "Read for the answer"), list(0, k));
    if (top.length > k) column.append(el("details", {}, el("summary", {}, "Further down, not read: " + (top.length - k)), list(k, top.length)));
    return column;
  };

  const verdictOf = (q) => {
    const said = { better: "The fine-tuned model's answer is better.", worse: "The baseline's answer is better.", same: "Neither answer is better.", unknown: "The answers were not compared." }[q.answer];
    const box = el("div", { class: "verdict " + q.answer }, el("p", {}, el("b", {}, said), " ",
      q.shared ? "Both models gave the same documents in the same order, so there is one answer." : ""));
    const j = q.judgement;
    if (j && j.verdict) {
      const grade = (name) => name + " " + j["baseline_" + name].toFixed(1) + " and " + j["finetuned_" + name].toFixed(1);
      box.append(el("p", { class: "fine" }, "Grades 0 to 2, baseline and fine-tuned: " + grade("correct") + ", " + grade("supported") + "." +
        (j.flipped ? " The order of the answers changed the verdict." : "")));
      if (j.reason) box.append(el("p", { class: "fine" }, "Judge, with the baseline's answer as A: " + j.reason));
    }
    if (q.status !== "ok") box.append(el("p", { class: "fine" }, "Problem: " + q.status));
    return box;
  };

  const detailOf = (q) => {
    const box = el("div", { class: "inside" });
    if (hasAnswers) box.append(verdictOf(q));
    if (hasAnswers && q.shared) box.append(answerOf(q, "baseline"));
    box.append(el("div", { class: "sides" }, columnOf(q, "baseline"), columnOf(q, "finetuned")));
    const listed = new Set([...q.baseline.top, ...q.finetuned.top].map(([d]) => d));
    const missing = q.gold.filter((d) => !listed.has(d));
    if (missing.length) {
      box.append(el("section", { class: "missing" }, el("h4", {}, "Gold, in neither list"),
        ...missing.map((d) => el("div", {}, el("div", { class: "meta" }, el("span", { class: "badge" }, "★ gold"), el("code", {}, d)), longText(data.documents[d][1], 280)))));
    }
    return box;
  };

  // ---------------------------------------------------------------- the list

  const draw = () => {
    const rows = document.createDocumentFragment();
    for (const item of visible.slice(0, state.shown)) {
      rows.append(item.row || buildRow(item));
      if (item.detail && item.row.querySelector("button").getAttribute("aria-expanded") === "true") rows.append(item.detail);
    }
    $("rows").replaceChildren(rows);
    const n = Math.min(state.shown, visible.length);
    $("count").textContent = visible.length === 0 ? "No query matches."
      : (n < visible.length ? n.toLocaleString("en") + " shown of " : "") + visible.length.toLocaleString("en") +
        (visible.length < items.length ? " matching, of " + items.length.toLocaleString("en") : "") + (items.length === 1 ? " query" : " queries");
    const rest = visible.length - n;
    $("more").hidden = rest === 0;
    $("more").textContent = "Show the other " + rest.toLocaleString("en");
  };

  const update = () => {
    const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
    visible = items.filter(({ q, text }) => (state.retrieval === "all" || q.retrieval === state.retrieval) &&
      (state.answer === "all" || (state.answer === "problem" ? q.status !== "ok" : q.answer === state.answer)) &&
      words.every((word) => text.includes(word)));
    const column = COLUMNS.find((c) => c.id === state.sort);
    if (column) {
      const sign = state.down ? -1 : 1;
      const value = new Map(visible.map((item) => [item, column.value(item.q)]));
      visible.sort((a, b) => {
        const [x, y] = [value.get(a), value.get(b)];
        return (x < y ? -sign : x > y ? sign : 0) || a.index - b.index;
      });
    }
    for (const th of $("head").children) {
      th.setAttribute("aria-sort", th.dataset.sort !== state.sort ? "none" : state.down ? "descending" : "ascending");
    }
    for (const button of $("retrieval").children) button.setAttribute("aria-pressed", String(button.dataset.value === state.retrieval));
    $("sort").value = state.sort === "order" ? "order" : state.sort + (state.down ? "-down" : "");
    draw();
  };
  const set = (changes) => { Object.assign(state, { shown: PAGE }, changes); update(); };

  for (const column of COLUMNS) {
    const button = el("button", { type: "button" }, column.label);
    button.addEventListener("click", () => set({ sort: column.id, down: state.sort === column.id ? !state.down : !!column.downFirst }));
    $("head").append(el("th", { role: "columnheader", scope: "col", "data-sort": column.id }, button));
    for (const down of column.downFirst ? [true, false] : [false, true]) {
      const text = column.id === "change" ? (down ? "rank change, gains first" : "rank change, losses first") : column.label.toLowerCase() + (down ? ", backwards" : "");
      $("sort").append(el("option", { value: column.id + (down ? "-down" : "") }, text));
    }
  }
  $("sort").prepend(el("option", { value: "order" }, "order of the data"));
  $("sort").addEventListener("change", (e) => set({ sort: e.target.value.replace("-down", ""), down: e.target.value.endsWith("-down") }));

  for (const value of ["all", "fixed", "broken", "same"]) {
    const n = value === "all" ? items.length : items.filter(({ q }) => q.retrieval === value).length;
    const button = el("button", { type: "button", "data-value": value }, (value === "all" ? "all" : SIGN[value]) + " " + n.toLocaleString("en"));
    button.addEventListener("click", () => set({ retrieval: value }));
    $("retrieval").append(button);
  }
  if (hasAnswers) {
    for (const value of ["all", "better", "worse", "same", "unknown", "problem"]) {
      const n = items.filter(({ q }) => value === "all" || (value === "problem" ? q.status !== "ok" : q.answer === value)).length;
      const label = { unknown: "not known", problem: "with a problem" }[value] || value;
      if (n || value === "all") $("answer").append(el("option", { value }, label + " " + n.toLocaleString("en")));
    }
    $("answer").addEventListener("change", (e) => set({ answer: e.target.value }));
  }
  $("search").addEventListener("input", (e) => set({ search: e.target.value }));
  $("more").addEventListener("click", () => { state.shown = Infinity; draw(); });
  update();
})();
