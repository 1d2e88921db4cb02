// Sizes and durations as people read them.

/** Such as `1.5 GB`. */
export function bytes(count) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let unit = units.shift();
  for (; count >= 1000 && units.length; unit = units.shift()) count /= 1000;
  return `${count.toFixed(unit === "bytes" ? 0 : 1)} ${unit}`;
}

/** Such as `12 s`, `3 min 20 s`, `2 h 05 min`. */
export function seconds(count) {
  const whole = Math.max(0, Math.round(count));
  const two = (number) => String(number).padStart(2, "0");
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
  if (whole < 86_400) return `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))} min`;
  return `${Math.floor(whole / 86_400)} d ${Math.floor((whole % 86_400) / 3600)} h`;
}
