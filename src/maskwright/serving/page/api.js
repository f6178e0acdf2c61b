// Requests to the service that sent this page.

const TOKEN = "maskwright-token";
const BUSY_TRIES = 10; // times that a request is repeated while the queue is full

// An error in the words of the service: where, what was found, and the remedy.
export class Problem extends Error {
  constructor({ status = 0, where = "", found = "", remedy = "", request_id: requestId = "" }) {
    super(found);
    Object.assign(this, { status, where, found, remedy, requestId });
  }
}

export const hasToken = () => sessionStorage.getItem(TOKEN) !== null;
export const keepToken = (token) => sessionStorage.setItem(TOKEN, token);

// Returns the models by name; waits until they are loaded.
export async function fetchModels(onWait) {
  for (;;) {
    try {
      return await (await send("v1/models", {})).json();
    } catch (problem) {
      if (problem.status !== 503) throw problem;
      onWait();
      await pause(problem.retryAfter);
    }
  }
}

// Returns the text of the JSON answer for an image; while the service is busy, tries again.
export async function segment(model, file, options, { signal, onBusy }) {
  const body = new FormData();
  body.append("image", file);
  for (const [name, value] of Object.entries(options)) body.append(name, value);
  const request = { method: "POST", body, signal, headers: { Accept: "application/json" } };
  for (let tries = 1; ; tries++) {
    try {
      return await (await send(`v1/models/${encodeURIComponent(model)}/segment`, request)).text();
    } catch (problem) {
      if (problem.status !== 503 || tries === BUSY_TRIES) throw problem;
      onBusy();
      await pause(problem.retryAfter, signal);
    }
  }
}

async function send(path, request) {
  const headers = { ...request.headers };
  if (hasToken()) headers.Authorization = `Bearer ${sessionStorage.getItem(TOKEN)}`;
  let response;
  try {
    response = await fetch(path, { ...request, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const remedy = "check that it is running, then try again";
    throw new Problem({ where: location.host, found: "the service did not answer", remedy });
  }
  if (response.ok) return response;
  throw await readProblem(response);
}

async function readProblem(response) {
  let details;
  try {
    details = await response.json();
  } catch {
    details = { found: `the answer has status ${response.status} and no explanation` }; // by a proxy
  }
  const problem = new Problem({ ...details, status: response.status });
  problem.retryAfter = Number(response.headers.get("Retry-After")) || 1;
  return problem;
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}
