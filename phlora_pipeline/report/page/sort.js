"use strict";
// Tables whose heads are buttons are sorted by them: numbers by `data-v`, the rest as text; what has no value comes last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const words = new Intl.Collator(undefined, { numeric: true });
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const first = head.querySelector("button").dataset.first || "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const way = head.getAttribute("aria-sort") === first ? other : first;
    heads.forEach((each) => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", way);
    const sign = way === "ascending" ? 1 : -1;
    const keyed = [...body.rows].map((row) => {
      const cell = row.cells[column];
      const told = cell.dataset.v;
      return [told === undefined ? cell.textContent.trim() : told === "" ? null : Number(told), row];
    });
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * (typeof a === "number" ? a - b : words.compare(a, b));
    });
    body.append(...keyed.map(([, row]) => row));
  }));
}
for (const field of document.querySelectorAll("input.find")) {
  const rows = [...document.getElementById(field.dataset.table).tBodies[0].rows];
  field.addEventListener("input", () => {
    const wanted = field.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
}
