"use strict";
// Each table of all samples: sorts, searches, and shows a page at a time, since a browser cannot hold them all as rows.
// Everything from a run is set as text, never as HTML.
const PAGE = 25;

function dataTable(section) {
  const { kinds, columns, short } = JSON.parse(document.getElementById(section.dataset.source).textContent);
  const total = columns[0].length;
  const search = section.querySelector("input");
  const count = section.querySelector(".count");
  const heads = [...section.querySelectorAll("thead th")];
  const body = section.querySelector("tbody");
  const buttons = Object.fromEntries([...section.querySelectorAll(".pager button")].map((b) => [b.dataset.to, b]));
  let order = Array.from({ length: total }, (_, row) => row); // as sorted
  let found = order; // the rows that the search finds, in the same order
  let haystack = null; // lower-case words of each row, made at the first search
  let page = 0;
  const rising = columns[0].every((value, row, all) => row === 0 || value === null || all[row - 1] <= value); // answers may not be
  let sorted = { column: rising ? 0 : null, down: false };

  function formatted(value) {
    if (Number.isInteger(value)) return value.toLocaleString("en");
    const size = Math.abs(value);
    return size >= 1e-4 && size < 1e6 ? String(Number(value.toPrecision(4))) : value.toExponential(3);
  }

  function words(text) {
    const words = document.createElement("bdi");
    words.className = "sample";
    words.dir = "auto";
    words.textContent = text;
    return words;
  }

  function cell(column, row) {
    const value = columns[column][row];
    const td = document.createElement(column ? "td" : "th"); // the first cell is the row's name
    if (!column) td.scope = "row";
    td.className = kinds[column];
    if (value === null) {
      td.classList.add("none");
      td.textContent = "-";
    } else if (kinds[column] === "number") {
      td.textContent = formatted(value);
    } else if (value.length > short) {
      const details = document.createElement("details");
      details.className = "long";
      const summary = document.createElement("summary");
      // not within a surrogate pair
      summary.append(words(value.slice(0, short).replace(/[\ud800-\udbff]$/, "") + " ..."));
      details.append(summary);
      details.addEventListener("toggle", () => details.children.length > 1 || details.append(words(value)));
      td.append(details);
    } else {
      td.append(words(value));
    }
    return td;
  }

  function show() {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    const start = page * PAGE;
    const rows = found.slice(start, start + PAGE).map((row) => {
      const tr = document.createElement("tr");
      tr.append(...columns.map((_, column) => cell(column, row)));
      return tr;
    });
    body.replaceChildren(...rows);
    const of = `${found.length.toLocaleString("en")}${found.length < total ? " found" : ""}`;
    count.textContent = found.length ? `${(start + 1).toLocaleString("en")} to ${(start + rows.length).toLocaleString("en")} of ${of}` : "none found";
    // aria-disabled keeps the focus where it is when the last page is reached
    for (const [to, button] of Object.entries(buttons)) {
      button.setAttribute("aria-disabled", String(to === "first" || to === "previous" ? page === 0 : page === pages - 1));
    }
    heads.forEach((head, column) => {
      const direction = sorted.down ? "descending" : "ascending";
      head.setAttribute("aria-sort", column === sorted.column ? direction : "none");
    });
  }

  function sort(column) {
    sorted = { column, down: sorted.column === column && !sorted.down };
    const values = columns[column];
    const sign = sorted.down ? -1 : 1;
    order = Array.from(order).sort((a, b) => {
      const [x, y] = [values[a], values[b]];
      if (x === null || y === null) return (x === null) - (y === null); // missing values come last, in either direction
      return x < y ? -sign : x > y ? sign : a - b;
    });
    filter();
  }

  function filter() {
    const wanted = search.value.toLowerCase().trim();
    if (wanted && !haystack) {
      const texts = columns.filter((_, column) => kinds[column] !== "number");
      haystack = order.map((_, row) => texts.map((text) => text[row] ?? "").join("\n").toLowerCase());
    }
    found = wanted ? order.filter((row) => haystack[row].includes(wanted)) : order;
    page = 0;
    show();
  }

  let waiting = 0;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 100);
  });
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => sort(column)));
  const moves = { first: () => 0, previous: () => page - 1, next: () => page + 1, last: () => Infinity };
  for (const [to, button] of Object.entries(buttons)) {
    button.addEventListener("click", () => {
      page = moves[to]();
      show();
    });
  }
  show();
}

document.querySelectorAll(".data").forEach(dataTable);
