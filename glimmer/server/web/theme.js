/* Applies the chosen light or dark colours before the page is painted. A classic script, so that nothing is drawn earlier. */
"use strict";
{
  const theme = localStorage.getItem("glimmer.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
}
