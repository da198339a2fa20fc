"use strict";
{
  const body = document.querySelector("#features tbody");
  const rows = [...body.rows];
  const filters = document.querySelector("#filters");
  const count = document.querySelector("#count");

  const isShown = (row, text, least, plain) => {
    const { feature, images, flags } = row.dataset;
    const isNumber = /^[0-9]+$/.test(text);
    const fits = isNumber ? feature === text : row.dataset.class.toLowerCase().includes(text);
    return fits && Number(images) >= least && !(plain && flags);
  };

  const filter = () => {
    const text = filters.elements.text.value.trim().toLowerCase().replace(/^.*:/, "");
    const least = Number(filters.elements.least.value) || 0;
    for (const row of rows) row.hidden = !isShown(row, text, least, filters.elements.plain.checked);
    const n = rows.filter((row) => !row.hidden).length;
    count.textContent = n === rows.length ? `${n} features` : `${n} of ${rows.length} features`;
  };

  const compare = (key, direction) => (a, b) => {
    const [x, y] = [a.dataset[key], b.dataset[key]];
    if (x === "" || y === "") return (x === "") - (y === "");
    const difference = Number.isNaN(Number(x)) ? x.localeCompare(y) : Number(x) - Number(y);
    return direction * difference || Number(a.dataset.feature) - Number(b.dataset.feature);
  };

  const sort = (button) => {
    const header = button.parentElement;
    const first = button.dataset.key === "feature" || button.dataset.key === "entropy" ? 1 : -1;
    const was = header.getAttribute("aria-sort");
    const direction = was === "none" ? first : was === "ascending" ? -1 : 1;
    for (const other of header.parentElement.querySelectorAll("[aria-sort]")) {
      other.setAttribute("aria-sort", "none");
    }
    header.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    body.append(...rows.sort(compare(button.dataset.key, direction)));
  };

  filters.addEventListener("input", filter);
  filters.addEventListener("submit", (event) => event.preventDefault());
  for (const button of document.querySelectorAll("#features th button")) {
    button.addEventListener("click", () => sort(button));
  }
  filter();
}
