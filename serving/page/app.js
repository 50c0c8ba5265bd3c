// The page for people: asks for a video, watches the job, shows the video and the map of what was skipped.
const form = document.getElementById("ask");
const problem = document.getElementById("problem");
const jobs = document.getElementById("jobs");
const COLOURS = { C: "#4263eb", R: "#adb5bd", D: "#dee2e6", F: "#f59f00" };
const WORDS = { C: "run", R: "reused", D: "not needed", F: "forecast" };
let models = [];

async function ask(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (form.key.value) headers.Authorization = `Bearer ${form.key.value}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  if (answer.status === 401) document.getElementById("key").hidden = false;
  const told = await answer.json().catch(() => null);
  throw new Error(told?.error?.message || `the server answered ${answer.status}`);
}

function options(select, values) {
  select.replaceChildren(...values.map(([value, text]) => new Option(text, value)));
}

function fitProfiles() {
  const model = models.find((each) => each.id === form.model.value);
  if (!model) return;
  const steps = Number(form.steps.value) || model.num_inference_steps;
  const own = model.profiles.filter((profile) => profile.num_inference_steps === steps);
  options(form.profile, [["", "default"], ...own.map(({ name }) => [name, name])]);
  form.steps.placeholder = model.num_inference_steps;
  form.steps.max = model.max_inference_steps;
  form.prompt.placeholder = model.sample_prompt;
}

async function loadModels() {
  try {
    models = (await (await ask("/v1/models")).json()).data;
    options(form.model, models.map(({ id, size, num_frames }) => [id, `${id} (${num_frames} frames of ${size})`]));
    fitProfiles();
    problem.textContent = "";
  } catch (error) {
    problem.textContent = error.message;
  }
}

function element(name, text = "") {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function show(job) {
  const article = element("article");
  const status = element("p");
  const bar = element("progress");
  bar.max = 100;
  const stop = element("button", "Delete");
  stop.type = "button";
  article.append(element("h2", job.prompt), status, bar, stop);
  jobs.prepend(article);
  return { article, status, bar, stop };
}

function drawMap(skipped) {
  const canvas = element("canvas");
  const blocks = skipped.steps[0]?.length || 0;
  canvas.width = skipped.steps.length * 8;
  canvas.height = blocks * 8;
  const context = canvas.getContext("2d");
  skipped.steps.forEach((step, x) => {
    [...step].forEach((letter, y) => {
      context.fillStyle = COLOURS[letter];
      context.fillRect(x * 8, y * 8, 7, 7);
    });
  });
  canvas.setAttribute("role", "img");
  const counts = Object.entries(WORDS).map(([letter, word]) => {
    const count = skipped.steps.join("").split(letter).length - 1;
    return `${count} ${word}`;
  });
  canvas.setAttribute("aria-label", `Blocks by steps: ${counts.join(", ")}`);
  const legend = element("p", "Steps from left to right, blocks from top to bottom: ");
  for (const [letter, word] of Object.entries(WORDS)) {
    const mark = element("span", "■ ");
    mark.style.color = COLOURS[letter];
    legend.append(mark, `${word} `);
  }
  return [canvas, legend];
}

async function finish(job, shown) {
  const video = element("video");
  video.src = URL.createObjectURL(await (await ask(`/v1/videos/${job.id}/content`)).blob());
  video.controls = video.loop = video.autoplay = video.muted = true;
  const link = element("a", "Save the video");
  link.href = video.src;
  link.download = job.file_name;
  const skipped = await (await ask(`/v1/videos/${job.id}/skipped`)).json();
  const percent = (100 * skipped.share_skipped).toFixed(1);
  const words = `${percent} % of the block calls were skipped; made in ${job.inference_time_s.toFixed(1)} s, seed ${job.seed}`;
  const notes = job.notes.map((note) => element("p", `Note: ${note}`));
  shown.stop.before(video, element("p", words), ...notes, ...drawMap(skipped), link, " ");
}

async function watch(job) {
  const shown = show(job);
  let deleted = false;
  shown.stop.onclick = async () => {
    deleted = true;
    try {
      await ask(`/v1/videos/${job.id}`, { method: "DELETE" });
      shown.article.remove();
    } catch (error) {
      deleted = false;
      shown.status.textContent = error.message;
    }
  };
  try {
    while (!deleted) {
      const place = job.place_in_queue === null ? "" : `, ${job.place_in_queue} before it`;
      shown.status.textContent = job.error ? `failed: ${job.error.message}` : `${job.phase}${place}`;
      shown.bar.value = job.progress;
      if (job.status === "completed") await finish(job, shown);
      if (job.status === "completed" || job.status === "failed") {
        shown.bar.remove();
        return;
      }
      await new Promise((resolve) => setTimeout(resolve, 300));
      if (!deleted) job = await (await ask(`/v1/videos/${job.id}`)).json();
    }
  } catch (error) {
    if (!deleted) shown.status.textContent = error.message;
  }
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  problem.textContent = "";
  const body = { prompt: form.prompt.value, model: form.model.value };
  if (form.profile.value) body.profile = form.profile.value;
  if (form.steps.value) body.num_inference_steps = Number(form.steps.value);
  if (form.seed.value) body.seed = Number(form.seed.value);
  try {
    const headers = { "Content-Type": "application/json" };
    watch(await (await ask("/v1/videos", { method: "POST", headers, body: JSON.stringify(body) })).json());
  } catch (error) {
    problem.textContent = error.message;
  }
});
form.model.addEventListener("change", fitProfiles);
form.steps.addEventListener("input", fitProfiles);
form.key.addEventListener("change", loadModels);
loadModels();
