// each player draws what the strip below it already holds
document.querySelectorAll(".film").forEach((film) => {
  const cells = [...film.querySelectorAll(".cell")];
  const canvases = [...film.querySelectorAll("canvas")];
  const button = film.querySelector("button"), seek = film.querySelector("input"), now = film.querySelector("span");
  let frame = 0, timer = 0;
  const show = (index) => {
    cells[frame].classList.remove("current");
    frame = index;
    cells[frame].classList.add("current");
    canvases.forEach((canvas, row) => canvas.getContext("2d").drawImage(cells[frame].children[row], 0, 0));
    seek.value = frame;
    now.textContent = `frame ${cells[frame].textContent.trim()}`;
  };
  const play = (on) => {
    clearInterval(timer);
    timer = on ? setInterval(() => show((frame + 1) % cells.length), Number(film.dataset.milliseconds)) : 0;
    button.textContent = on ? "Pause" : "Play";
  };
  addEventListener("load", () => {
    film.querySelector(".player").hidden = false;
    show(0);
    play(cells.length > 1 && !matchMedia("(prefers-reduced-motion: reduce)").matches);
  });
  button.addEventListener("click", () => play(!timer));
  seek.addEventListener("input", (event) => { play(false); show(Number(event.target.value)); });
  cells.forEach((cell, index) => cell.addEventListener("click", () => { play(false); show(index); }));
});
