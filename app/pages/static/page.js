// What every page has: the theme's button, notices, buttons that copy.

const THEMES = { "": ["◐", "as the system"], light: ["☀", "light"], dark: ["☾", "dark"] };
const root = document.documentElement;

function showTheme() {
  const button = document.getElementById("theme");
  const [sign, name] = THEMES[root.dataset.theme ?? ""];
  button.textContent = sign;
  button.setAttribute("aria-label", `Theme: ${name}`);
}

document.getElementById("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(root.dataset.theme ?? "") + 1) % names.length];
  if (next) {
    root.dataset.theme = next;
    localStorage.setItem("theme", next);
  } else {
    delete root.dataset.theme;
    localStorage.removeItem("theme");
  }
  showTheme();
});
showTheme();

/** Tell the reader something; "bad" stays until it is closed, the rest goes by itself. */
export function notify(text, kind = "good") {
  const notice = document.createElement("div");
  notice.className = `notice ${kind}`;
  notice.textContent = text;
  const close = document.createElement("button");
  close.className = "quiet icon";
  close.setAttribute("aria-label", "Close");
  close.textContent = "×";
  close.addEventListener("click", () => notice.remove());
  notice.append(close);
  document.getElementById("notices").append(notice);
  if (kind !== "bad") setTimeout(() => notice.remove(), 5000);
}

/** Ask the API. Returns what it answers; throws an Error with the problem's words, and the problem as `problem`. */
export async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The service does not answer.");
  }
  const isJson = (answer.headers.get("content-type") ?? "").includes("json");
  const text = await answer.text();
  const body = isJson && text ? JSON.parse(text) : text;
  if (answer.status === 401) location.assign(`/sign-in?next=${encodeURIComponent(location.pathname + location.search)}`);
  if (!answer.ok) throw Object.assign(new Error(isJson ? body.detail : body || answer.statusText), { problem: body });
  return body;
}

/** `<button data-copy="#id">` copies the text of an element, `data-copy-text` its own value. */
document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy], [data-copy-text]");
  if (!button) return;
  const text = button.dataset.copyText ?? document.querySelector(button.dataset.copy).textContent;
  try {
    await navigator.clipboard.writeText(text.trim());
    const was = button.textContent;
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = was), 1500);
  } catch {
    notify("This browser does not let pages copy here; select the text instead.", "bad");
  }
});

document.addEventListener("htmx:error", () => notify("The service does not answer.", "bad"));
