"""Theme of the app: one accent color, warm grays, system fonts and a type scale, in light and dark.

`style.css` uses the variables of this theme, and has no colors besides those of outcomes.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr

STYLE, HEAD, LOGO = (Path(__file__).with_name(name) for name in ("style.css", "head.html", "logo.svg"))
ACCENT, GRAYS = gr.themes.colors.teal, gr.themes.colors.stone
"""Palettes: the accent marks actions, links and selections only."""
FONT_SIZES = gr.themes.Size("11px", "12px", "13px", "14px", "16px", "20px", "25px", name="text")
"""Type scale: labels and hints 13 px, text 14 px, headings 16, 20 and 25 px."""


def theme() -> gr.themes.Base:
    """The theme. Text has a contrast of at least 4.5 to 1 on its background (WCAG AA); no font is downloaded."""
    base = gr.themes.Base(
        primary_hue=ACCENT, secondary_hue=ACCENT, neutral_hue=GRAYS, text_size=FONT_SIZES, radius_size=gr.themes.sizes.radius_md,
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
    return base.set(**_surfaces(), **_text(), **_buttons(), **_fields())


def _surfaces() -> dict[str, str]:
    """Pages are gray, cards on them white (or lighter than the page), with a thin border."""
    return {
        "body_background_fill": "*neutral_100",
        "body_background_fill_dark": "*neutral_950",
        "background_fill_primary": "white",
        "background_fill_primary_dark": "*neutral_900",
        "background_fill_secondary": "*neutral_50",
        "background_fill_secondary_dark": "*neutral_800",
        "block_background_fill": "white",
        "block_background_fill_dark": "*neutral_900",
        "block_border_width": "1px",
        "block_shadow": "none",
        "border_color_primary": "*neutral_200",
        "border_color_primary_dark": "*neutral_700",
        "layout_gap": "14px",
        "form_gap_width": "1px",
    }


def _text() -> dict[str, str]:
    return {
        "body_text_color": "*neutral_900",
        "body_text_color_dark": "*neutral_100",
        "body_text_color_subdued": "*neutral_600",
        "body_text_color_subdued_dark": "*neutral_400",
        "block_info_text_color": "*neutral_600",
        "block_info_text_color_dark": "*neutral_400",
        "block_label_text_color": "*neutral_700",
        "block_label_text_color_dark": "*neutral_200",
        "block_title_text_color": "*neutral_800",
        "block_title_text_color_dark": "*neutral_100",
        "block_title_text_weight": "600",
        "link_text_color": "*primary_700",
        "link_text_color_dark": "*primary_300",
        "link_text_color_hover": "*primary_800",
        "link_text_color_hover_dark": "*primary_200",
    }


def _buttons() -> dict[str, str]:
    return {
        "button_primary_background_fill": "*primary_700",
        "button_primary_background_fill_hover": "*primary_800",
        "button_primary_background_fill_dark": "*primary_400",
        "button_primary_background_fill_hover_dark": "*primary_300",
        "button_primary_text_color": "white",
        "button_primary_text_color_dark": "*neutral_950",
        "button_secondary_background_fill": "white",
        "button_secondary_background_fill_hover": "*neutral_100",
        "button_secondary_background_fill_dark": "*neutral_800",
        "button_secondary_background_fill_hover_dark": "*neutral_700",
        "button_secondary_border_color": "*neutral_300",
        "button_secondary_border_color_dark": "*neutral_600",
        "button_border_width": "1px",
        "color_accent_soft": "*primary_50",
        "color_accent_soft_dark": "*primary_950",
    }


def _fields() -> dict[str, str]:
    return {
        "input_background_fill": "white",
        "input_background_fill_dark": "*neutral_950",
        "input_border_color": "*neutral_300",
        "input_border_color_dark": "*neutral_600",
        "input_border_width": "1px",
        "input_placeholder_color": "*neutral_500",
        "input_placeholder_color_dark": "*neutral_400",
        "checkbox_label_background_fill": "white",
        "checkbox_label_background_fill_dark": "*neutral_900",
        "checkbox_label_border_color": "*neutral_300",
        "checkbox_label_border_color_dark": "*neutral_600",
        "checkbox_label_border_width": "1px",
        "checkbox_label_background_fill_selected": "*primary_50",
        "checkbox_label_background_fill_selected_dark": "*primary_950",
        "checkbox_label_border_color_selected": "*primary_700",
        "checkbox_label_border_color_selected_dark": "*primary_400",
        "checkbox_background_color_selected": "*primary_700",
        "checkbox_background_color_selected_dark": "*primary_500",
        "checkbox_border_color_selected": "*primary_700",
        "slider_color": "*primary_700",
        "slider_color_dark": "*primary_400",
    }


def brand() -> str:
    """Header of the app in HTML: logo, name and purpose."""
    purpose = "Fine-tune image models on your own photos: train a small adapter, generate with it, download it."
    return f'<header class="brand">{LOGO.read_text(encoding="utf-8")}<h1>veneer</h1><p>{purpose}</p></header>'
