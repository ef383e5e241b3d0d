// A page to chat with the server that it comes from. What models and people write enters the
// document as text nodes, never as HTML.
"use strict";

const find = (id) => document.getElementById(id);
let messages = [];
let running = null; // aborts the answer that is coming

const headers = () => {
  const key = find("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
};

const add = (kind, text) => {
  const made = document.createElement("div");
  made.className = kind;
  made.textContent = text;
  find("talk").append(made);
  made.scrollIntoView({ block: "end" });
  return made;
};

// The objects of server-sent events, as they come.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function answer() {
  const system = find("system").value.trim();
  const began = performance.now();
  const talk = messages; // a new chat has another list
  const said = add("message assistant", "");
  let usage = null;
  running = new AbortController();
  find("send").textContent = "Stop";
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: running.signal,
      body: JSON.stringify({
        messages: system ? [{ role: "system", content: system }, ...talk] : talk,
        temperature: Number(find("temperature").value),
        max_tokens: Number(find("tokens").value),
        stream: true,
        stream_options: { include_usage: true },
      }),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of events(response.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage || usage;
      const text = chunk.choices[0]?.delta.content;
      if (!text) continue;
      const end = find("talk").scrollHeight - find("talk").scrollTop - find("talk").clientHeight;
      said.append(text);
      if (end < 80) said.scrollIntoView({ block: "end" });
    }
  } catch (error) {
    if (error.name !== "AbortError") add("message error", error.message);
  }
  running = null;
  find("send").textContent = "Send";
  if (said.textContent) talk.push({ role: "assistant", content: said.textContent });
  else said.remove();
  if (usage) {
    const seconds = (performance.now() - began) / 1000;
    const cached = usage.prompt_tokens_details.cached_tokens;
    add("facts", `${usage.prompt_tokens} tokens read (${cached} of them kept), ` +
      `${usage.completion_tokens} written in ${seconds.toFixed(1)} s`);
  }
}

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const text = find("text").value.trim();
  if (!text) return;
  find("text").value = "";
  messages.push({ role: "user", content: text });
  add("message user", text);
  answer();
});

find("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) find("form").requestSubmit();
});

find("clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  find("talk").replaceChildren();
});

async function connect() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    const body = await response.json();
    find("model").textContent = response.ok ? body.data[0].id : body.error.message;
  } catch (error) {
    find("model").textContent = error.message;
  }
}
find("key").addEventListener("change", connect);
connect();
