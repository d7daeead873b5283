// One picture to the server and back: sends it, follows the lines that say how far it is.

const TRIES = 120; // while the queue is full, a second or so each

export class Failure extends Error {}

/** Resolves to the answer; tells every line to `told`; throws Failure with words for the user, or an AbortError. */
export async function answer(file, tasks, options, signal, told) {
  const query = new URLSearchParams({ tasks: tasks.join(","), ...options });
  for (let tries = 0; ; tries += 1) {
    const response = await post(`/api/answer?${query}`, file, signal);
    if (response.ok) return follow(response, told, signal);
    const { message } = await response.json().catch(() => ({ message: `The server answered with status ${response.status}.` }));
    if (response.status !== 503 || tries >= TRIES) throw new Failure(message);
    told({ state: "full", message });
    await new Promise((resolve) => { setTimeout(resolve, 700 + 600 * Math.random()); });
    signal.throwIfAborted();
  }
}

async function post(url, body, signal) {
  try {
    return await fetch(url, { method: "POST", body, signal, headers: { "Content-Type": "application/octet-stream" } });
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Failure("The server does not answer. Is densectx demo still running?");
  }
}

async function follow(response, told, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const now = JSON.parse(line);
        if (now.state === "failed") throw new Failure(now.message);
        if (now.state === "done") return now;
        told(now);
      }
    }
  } catch (error) {
    if (error instanceof Failure || signal.aborted) throw error;
  }
  throw new Failure("The connection ended before the answer came. Is densectx demo still running?");
}
