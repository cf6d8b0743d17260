//! Draws lines over a budget of slots, in the look of the heatmap: what `moe-hot replay --plot` writes.

use std::path::Path;

use plotters::{
    coord::Shift,
    prelude::*,
    style::{FontStyle, register_font},
};

const SIZE: (u32, u32) = (1040, 560);
/// Width of the names at the right, where no line runs.
const LEGEND: u32 = 180;
const INK: RGBColor = RGBColor(40, 40, 40);
/// Colours that also differ for the colour-blind (Okabe and Ito, 2008), without black.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(149, 38, 104),
];

/// One line.
#[derive(Clone, PartialEq, Debug)]
pub struct Line {
    /// Its name in the legend.
    pub name: String,
    /// A bound and not something that runs: drawn dark.
    pub bound: bool,
    /// (share of experts with a slot, value), from left to right.
    pub points: Vec<(f64, f64)>,
}

/// Is this the name of a picture that [`draw`] can write?
///
/// # Errors
/// What is expected.
pub fn check_name(path: &Path) -> Result<(), String> {
    match path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase).as_deref() {
        Some("png" | "svg") => Ok(()),
        _ => Err("expected a name that ends in .png or .svg".into()),
    }
}

/// Writes `lines` as a PNG or SVG, by the name's end; `value` names the vertical axis.
///
/// # Errors
/// As [`check_name`], and what the drawing library says, for example of a path that cannot be written.
pub fn draw(path: &Path, title: &str, value: &str, lines: &[Line]) -> Result<(), String> {
    let named = |e: String| format!("{}: {e}", path.display());
    check_name(path).map_err(named)?;
    register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_| "the built-in font cannot be read".to_string())?;
    let svg = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("svg"));
    if svg {
        lines_into(&SVGBackend::new(path, SIZE).into_drawing_area(), title, value, lines)
            .map_err(|e| named(e.to_string()))
    } else {
        lines_into(&BitMapBackend::new(path, SIZE).into_drawing_area(), title, value, lines)
            .map_err(|e| named(e.to_string()))
    }
}

/// Least and most of some numbers with air around them.
fn range(numbers: impl Iterator<Item = f64>) -> std::ops::Range<f64> {
    let (lo, hi) = numbers
        .filter(|n| n.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), n| (lo.min(n), hi.max(n)));
    if lo > hi {
        return 0.0..1.0;
    }
    let air = if hi > lo { 0.05 * (hi - lo) } else { 0.05 * hi.abs().max(1.0) };
    lo - air..hi + air
}

fn lines_into<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    title: &str,
    value: &str,
    lines: &[Line],
) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    area.fill(&WHITE)?;
    let text = |size: i32| ("sans-serif", size).into_font().color(&INK);
    let points = || lines.iter().flat_map(|l| &l.points);
    let (left, legend) = area.split_horizontally(SIZE.0 - LEGEND);
    let mut chart = ChartBuilder::on(&left)
        .margin(16)
        .caption(title, text(16))
        .x_label_area_size(44)
        .y_label_area_size(60)
        .build_cartesian_2d(range(points().map(|p| 100.0 * p.0)), range(points().map(|p| p.1)))?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(225, 225, 225))
        .axis_style(INK)
        .label_style(text(12))
        .axis_desc_style(text(13))
        .x_desc("experts with a slot")
        .y_desc(value)
        .x_label_formatter(&|x| format!("{x:.0}%"))
        .draw()?;
    let mut n_coloured = 0;
    for (row, line) in lines.iter().enumerate() {
        let style = if line.bound {
            INK.stroke_width(2)
        } else {
            n_coloured += 1;
            // a colour that comes again is thin
            let again = n_coloured > COLOURS.len();
            COLOURS[(n_coloured - 1) % COLOURS.len()].stroke_width(if again { 1 } else { 2 })
        };
        let at = || line.points.iter().map(|p| (100.0 * p.0, p.1)).filter(|p| p.1.is_finite());
        chart.draw_series(LineSeries::new(at(), style))?;
        chart.draw_series(at().map(|p| Circle::new(p, 3, style.filled())))?;
        let y = 48 + 20 * row as i32;
        legend.draw(&PathElement::new([(0, y), (20, y)], style))?;
        legend.draw(&Text::new(line.name.clone(), (28, y - 6), text(12)))?;
    }
    area.present()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines() -> Vec<Line> {
        let line = |name: &str, bound, by: f64| Line {
            name: name.into(),
            bound,
            points: [0.125, 0.25, 0.5].map(|x| (x, by * x)).to_vec(),
        };
        vec![line("optimum", true, 1.0), line("decay, 4", false, 1.5)]
    }

    #[test]
    fn the_names_end_says_what_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let written = |name: &str| {
            let path = dir.path().join(name);
            draw(&path, "tech.trace", "hit rate", &lines()).unwrap();
            std::fs::read(path).unwrap()
        };
        let png = written("a.png");
        assert!(png.starts_with(b"\x89PNG") && png.len() > 1000);
        let svg = String::from_utf8(written("a.SVG")).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for text in ["tech.trace", "hit rate", "optimum", "decay, 4", "experts with a slot"] {
            assert!(svg.contains(text), "{text} is missing");
        }
    }

    #[test]
    fn one_budget_and_no_line_are_drawn_too() {
        let dir = tempfile::tempdir().unwrap();
        let one = Line { name: "lru".into(), bound: false, points: vec![(0.25, 1.0)] };
        draw(&dir.path().join("one.svg"), "", "reads", &[one]).unwrap();
        draw(&dir.path().join("none.svg"), "", "reads", &[]).unwrap();
    }

    #[test]
    fn bad_paths_are_named() {
        let e = draw(Path::new("/nonexistent/a.png"), "", "", &lines()).unwrap_err();
        assert!(e.starts_with("/nonexistent/a.png: "), "{e}");
        let e = draw(Path::new("a.pdf"), "", "", &lines()).unwrap_err();
        assert_eq!(e, "a.pdf: expected a name that ends in .png or .svg");
    }
}
