// Settings are changed by the API; what the page lists of them is then asked for anew.

import { ask, notify } from "./page.js";
import { tellTimes } from "./times.js";

const find = (id) => document.getElementById(id);
const JSON_BODY = { "Content-Type": "application/json" };

/** Ask for the page again and take one section of it. */
async function renew(id) {
  const page = new DOMParser().parseFromString(await ask("/settings"), "text/html");
  const section = page.getElementById(id);
  find(id).replaceWith(section);
  tellTimes(section);
}

/** Do what somebody asked for, once at a time, and say what came of it. */
async function attempt(button, what) {
  button.disabled = true;
  try {
    await what();
  } catch (error) {
    notify(error.message, "bad");
  } finally {
    button.disabled = false;
  }
}

function showSecret(place, words, secret) {
  const code = Object.assign(document.createElement("code"), { textContent: secret });
  const copy = Object.assign(document.createElement("button"), { type: "button", textContent: "Copy" });
  copy.dataset.copyText = secret;
  const line = Object.assign(document.createElement("div"), { className: "secret" });
  line.append(code, copy);
  const notice = Object.assign(document.createElement("div"), { className: "notice good" });
  notice.append(Object.assign(document.createElement("p"), { textContent: words }), line);
  place.replaceChildren(notice);
}

find("new-key").addEventListener("submit", (event) => {
  event.preventDefault();
  const form = event.target;
  const scopes = [...form.querySelectorAll("[name=scope]:checked")].map((each) => each.value);
  const expires = find("key-expires").value;
  const days = Number(expires);
  const wanted = {
    name: find("key-name").value.trim(),
    scopes,
    expires_at: !expires ? null : Number.isNaN(days) ? expires : new Date(Date.now() + days * 86_400_000).toISOString(),
    owner: find("key-owner")?.value.trim() || null,
  };
  attempt(form.querySelector("button"), async () => {
    if (!scopes.length) throw new Error("A key that may do nothing is good for nothing: choose what it may do.");
    const made = await ask("/v1/api-keys", { method: "POST", headers: JSON_BODY, body: JSON.stringify(wanted) });
    showSecret(find("new-key-secret"), "This is the key. It is shown this once; keep it where it is safe.", made.secret);
    form.reset();
    await renew("keys");
  });
});

document.addEventListener("click", (event) => {
  const revoke = event.target.closest("[data-revoke]");
  if (revoke && confirm(`Revoke ${revoke.dataset.name}? Whoever uses it is refused from now on.`)) {
    attempt(revoke, async () => {
      await ask(`/v1/api-keys/${revoke.dataset.revoke}`, { method: "DELETE" });
      notify(`${revoke.dataset.name} is revoked.`);
      await renew("keys");
    });
  }
  const forget = event.target.closest("[data-forget]");
  if (forget && confirm(`Delete ${forget.dataset.forget}? Jobs that come to need it fail.`)) {
    attempt(forget, async () => {
      await ask(`/v1/credentials/${encodeURIComponent(forget.dataset.forget)}`, { method: "DELETE" });
      notify(`${forget.dataset.forget} is deleted.`);
      await renew("credentials");
    });
  }
});

const kind = find("credential-kind");
const usualNames = { "hub-token": "hub", s3: "s3" };

function showKind() {
  for (const fields of document.querySelectorAll("[data-kind]")) {
    fields.hidden = fields.dataset.kind !== kind.value;
    for (const input of fields.querySelectorAll("input")) input.disabled = fields.hidden;
  }
  const name = find("credential-name");
  if (Object.values(usualNames).includes(name.value)) name.value = usualNames[kind.value];
}

kind?.addEventListener("change", showKind);
if (kind) showKind();

find("new-credential")?.addEventListener("submit", (event) => {
  event.preventDefault();
  const form = event.target;
  const name = find("credential-name").value;
  const given = [...new FormData(form)].map(([key, value]) => [key, value.trim()]).filter(([, value]) => value);
  const body = JSON.stringify({ kind: kind.value, ...Object.fromEntries(given) });
  attempt(form.querySelector("button"), async () => {
    await ask(`/v1/credentials/${encodeURIComponent(name)}`, { method: "PUT", headers: JSON_BODY, body });
    notify(`${name} is kept.`);
    form.reset();
    showKind();
    await renew("credentials");
  });
});

find("show-webhook-secret")?.addEventListener("click", (event) => {
  attempt(event.target, async () => {
    const { secret } = await ask("/v1/webhook-secret");
    showSecret(find("webhook-secret"), "Keep it where your webhooks can read it, and nobody else.", secret);
  });
});
