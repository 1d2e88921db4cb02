// Moments in the reader's words: how long ago, and by the clock in a tooltip.

const STEPS = [[60, "second"], [60, "minute"], [24, "hour"], [7, "day"], [5, "week"], [12, "month"], [Infinity, "year"]];
const words = new Intl.RelativeTimeFormat("en", { numeric: "auto" });

function ago(moment) {
  let amount = (moment - Date.now()) / 1000;
  for (const [size, unit] of STEPS) {
    if (Math.abs(amount) < size || size === Infinity) return words.format(Math.round(amount), unit);
    amount /= size;
  }
}

/** Say every moment in `within` anew. */
export function tellTimes(within = document) {
  for (const each of within.querySelectorAll("time[datetime]")) {
    const moment = new Date(each.dateTime);
    each.textContent = Math.abs(moment - Date.now()) < 10_000 ? "just now" : ago(moment);
    each.title = moment.toLocaleString();
  }
}

tellTimes();
setInterval(() => document.hidden || tellTimes(), 20_000);
