// Faults of a page as the browser lays it out now: a function of what a test asks for, which returns
// a sentence for each. `wide`: whether every line of code has to fit. `dark`: the names of pictures
// that are drawn for dark pages.
({ wide, dark: darkPictures }) => {
  const LEAST_CODE = 11; // CSS pixels
  const SLACK = 1; // a pixel, which fractions of one may be rounded to
  const faults = [];
  const style = (element) => getComputedStyle(element);
  const scrolls = (element) => ["auto", "scroll"].includes(style(element).overflowX);
  // Without its scroll bar, the window is as wide as the document's element.
  const { clientWidth: width, scrollWidth } = document.documentElement;
  const within = ({ left, right }) => left >= -SLACK && right <= width + SLACK;
  const shown = (element) => {
    const { width, height } = element.getBoundingClientRect();
    return width > 0 && height > 0 && element.checkVisibility({ visibilityProperty: true });
  };
  const named = (element) => {
    const classes = [...element.classList].map((name) => `.${name}`).join("");
    const text = element.textContent.trim().replace(/\s+/g, " ").slice(0, 60);
    return `<${element.localName}${classes}> “${text}”`;
  };
  const places = [...document.querySelectorAll(".md-content, .md-footer")];
  const all = (selector) => places.flatMap((place) => [...place.querySelectorAll(selector)]);

  // The window, and everything in it.
  if (scrollWidth > width) {
    faults.push(`the page is ${scrollWidth} pixels wide in a window of ${width}`);
  }
  const inAScroller = (element) => {
    for (let above = element.parentElement; above; above = above.parentElement) {
      if (scrolls(above) && within(above.getBoundingClientRect())) return true;
    }
    return false;
  };
  for (const element of all(":not(svg *, math *)")) {
    if (!within(element.getBoundingClientRect()) && shown(element) && !inAScroller(element)) {
      faults.push(`sticks out of the window: ${named(element)}`);
    }
    const cut = element.clientWidth > 0 && element.scrollWidth > element.clientWidth + SLACK;
    if (cut && ["hidden", "clip"].includes(style(element).overflowX) && shown(element)) {
      faults.push(`is cut at the side: ${named(element)}`);
    }
  }

  // Code.
  for (const code of all("code").filter(shown)) {
    const size = parseFloat(style(code).fontSize);
    if (size < LEAST_CODE) faults.push(`code of ${size} pixels: ${named(code)}`);
  }
  for (const code of all("pre > code").filter(shown)) {
    if (code.scrollWidth > code.clientWidth + SLACK) {
      const lines = code.textContent.split("\n");
      const longest = lines.reduce((a, b) => (b.length > a.length ? b : a));
      if (wide) faults.push(`code has to be scrolled: “${longest}” (${longest.length})`);
      if (!scrolls(code)) faults.push(`code is cut: “${longest}”`);
    }
  }

  // Formulas.
  const formulas = all("math");
  for (const math of formulas) {
    if (!shown(math)) faults.push(`a formula without a size: ${named(math)}`);
    if (math.querySelector("merror")) faults.push(`a formula with an error: ${named(math)}`);
  }
  const fonts = [...document.fonts].filter((font) => font.status === "loaded");
  if (formulas.length && !fonts.some((font) => font.family.includes("Formulas"))) {
    faults.push("formulas without their font");
  }
  for (const formula of all(".formula")) {
    if (formula.scrollHeight > formula.clientHeight + SLACK) {
      faults.push(`a formula is cut below: ${named(formula)}`);
    }
  }

  // Pictures.
  const scheme = document.body.dataset.mdColorScheme;
  const isDark = scheme === "slate";
  const pictures = all("img").map((picture) => {
    const name = (picture.currentSrc || picture.src).split("#")[0].split("/").pop();
    return { picture, name, twin: name.replace(/\.(\w+)$/, "-dark.$1") };
  });
  for (const { picture, name, twin } of pictures) {
    if (!picture.complete || !picture.naturalWidth) {
      faults.push(`no picture: ${picture.src}`);
      continue;
    }
    const forDark = darkPictures.includes(name);
    const hasTwin = darkPictures.includes(twin);
    const expected = forDark ? isDark : !(hasTwin && isDark);
    if (shown(picture) !== expected) {
      faults.push(`${name} is ${expected ? "hidden" : "shown"} on a page that is ${scheme}`);
    }
    if (hasTwin && !pictures.some((other) => other.name === twin)) {
      faults.push(`${name} is on the page without ${twin}`);
    }
    // Transparent parts of a picture for light pages show what is below.
    if (isDark && !forDark && shown(picture)) {
      const [r, g, b, alpha = 1] = style(picture).backgroundColor.match(/[\d.]+/g).map(Number);
      if (alpha < 1 || Math.min(r, g, b) < 200) faults.push(`${name} is on a dark background`);
    }
  }
  return faults;
}
