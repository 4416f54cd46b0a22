// Sorts tables by a click on a column's head, and opens the details of a row. Without scripts the
// rows stand in their order from best to worst and every detail is open.
"use strict";

for (const table of document.querySelectorAll("table.rows")) {
  for (const details of table.querySelectorAll("tr.details")) details.hidden = true;

  for (const button of table.querySelectorAll("button.row-name")) {
    button.setAttribute("aria-expanded", "false");
    button.addEventListener("click", () => {
      const details = button.closest("tbody").querySelector("tr.details");
      details.hidden = !details.hidden;
      button.setAttribute("aria-expanded", String(!details.hidden));
    });
  }

  const heads = [...table.querySelectorAll("thead th")];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (button) button.addEventListener("click", () => sort(table, heads, column));
  });
}

// A row and its details are one tbody and move together; rows without a value stay last.
function sort(table, heads, column) {
  const down = heads[column].getAttribute("aria-sort") === "ascending";
  for (const head of heads) head.removeAttribute("aria-sort");
  heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (body) => body.querySelector("tr.row").cells[column].dataset.value;
  const order = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const numbers = heads[column].classList.contains("number");
    const sign = numbers ? Number(x) - Number(y) : x.localeCompare(y);
    return down ? -sign : sign;
  };
  const bodies = [...table.tBodies].sort(order);
  table.append(...bodies);
}
