// The box above the cases shows the rows that hold all its words.
const box = document.getElementById("filter");
const rows = [...document.querySelectorAll("#cases tbody tr")];
const shown = document.getElementById("shown");
box.addEventListener("input", () => {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const row of rows) {
    const cells = [...row.querySelectorAll("td.text")];
    const names = cells.map((cell) => `${cell.textContent} ${cell.title}`).join(" ").toLowerCase();
    row.hidden = !words.every((word) => names.includes(word));
    count += row.hidden ? 0 : 1;
  }
  shown.textContent = `${count} of ${rows.length} rows`;
});
