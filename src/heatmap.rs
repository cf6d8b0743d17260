//! Draws which experts a text used: layers down, experts across, colour for the share of tokens.

use std::path::Path;

use plotters::{
    prelude::*,
    style::{FontStyle, register_font},
};

use crate::trace::TraceLayer;

const MARGIN: (i32, i32) = (64, 56);
const LEGEND: i32 = 104;
const MAX_WIDTH: i32 = 1400;

/// Dark to light with equal steps in lightness, so that it also reads in grey.
fn colour(share: f64) -> RGBColor {
    const STOPS: [(f64, f64, f64); 6] = [
        (13., 8., 45.),
        (74., 12., 107.),
        (149., 38., 104.),
        (221., 81., 58.),
        (252., 165., 10.),
        (252., 255., 164.),
    ];
    let at = share.clamp(0.0, 1.0) * (STOPS.len() - 1) as f64;
    let i = (at as usize).min(STOPS.len() - 2);
    let (a, b, t) = (STOPS[i], STOPS[i + 1], at - i as f64);
    let mix = |a: f64, b: f64| (a + (b - a) * t).round() as u8;
    RGBColor(mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
}

/// Writes the map of `counts[layer][expert]` over `tokens` tokens as a PNG.
///
/// # Errors
/// What the drawing library says, for example of a path that cannot be written.
pub fn draw(
    path: &Path,
    title: &str,
    layers: &[TraceLayer],
    counts: &[Vec<u64>],
    tokens: u64,
) -> Result<(), String> {
    register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_| "the built-in font cannot be read".to_string())?;
    let n_expert = counts.iter().map(Vec::len).max().unwrap_or(0).max(1) as i32;
    let n_layer = layers.len().max(1) as i32;
    let cell = ((MAX_WIDTH - MARGIN.0 - LEGEND) / n_expert).clamp(3, 18);
    let row = cell.max(12);
    let (width, height) = (MARGIN.0 + n_expert * cell + LEGEND, MARGIN.1 + n_layer * row + 40);
    let most = counts.iter().flatten().copied().max().unwrap_or(0).max(1);
    let share = |n: u64| n as f64 / tokens.max(1) as f64;

    let area = BitMapBackend::new(path, (width as u32, height as u32)).into_drawing_area();
    let result = (|| {
        area.fill(&WHITE)?;
        let text = |size: i32| ("sans-serif", size).into_font().color(&RGBColor(40, 40, 40));
        area.draw(&Text::new(title.to_string(), (MARGIN.0, 12), text(16)))?;
        for (l, counts) in counts.iter().enumerate() {
            let y = MARGIN.1 + l as i32 * row;
            for (e, n) in counts.iter().enumerate() {
                let x = MARGIN.0 + e as i32 * cell;
                let c = colour(*n as f64 / most as f64);
                area.draw(&Rectangle::new([(x, y), (x + cell - 1, y + row - 1)], c.filled()))?;
            }
            if l % (n_layer as usize).div_ceil(32) == 0 {
                area.draw(&Text::new(format!("layer {}", layers[l].il), (6, y + row / 2 - 6), text(12)))?;
            }
        }
        let step = [1, 2, 4, 8, 16, 32, 64].into_iter().find(|s| s * cell >= 36).unwrap_or(128);
        for e in (0..n_expert).step_by(step as usize) {
            area.draw(&Text::new(e.to_string(), (MARGIN.0 + e * cell, MARGIN.1 - 16), text(12)))?;
        }
        area.draw(&Text::new("expert", (MARGIN.0, MARGIN.1 + n_layer * row + 10), text(12)))?;

        let x = MARGIN.0 + n_expert * cell + 16;
        let bar = (n_layer * row).max(60);
        for y in 0..bar {
            let c = colour(1.0 - f64::from(y) / f64::from(bar));
            area.draw(&Rectangle::new([(x, MARGIN.1 + y), (x + 14, MARGIN.1 + y + 1)], c.filled()))?;
        }
        for (at, n) in [(0, most), (bar - 12, 0)] {
            let label = format!("{:.0}%", 100.0 * share(n));
            area.draw(&Text::new(label, (x + 20, MARGIN.1 + at), text(12)))?;
        }
        area.draw(&Text::new("of tokens", (x, MARGIN.1 + bar + 10), text(12)))?;
        area.present()
    })();
    result.map_err(|e: DrawingAreaErrorKind<_>| format!("{}: {e}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_png_comes_out_and_a_bad_path_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("map.png");
        let layers = [TraceLayer { il: 3, n_expert: 64, n_used: 8, class: 0, expert_bytes: 1 }; 6];
        let counts: Vec<Vec<u64>> = (0..6).map(|l| (0..64).map(|e| (l * e) % 50).collect()).collect();
        draw(&path, "test", &layers, &counts, 50).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert!(bytes.starts_with(b"\x89PNG") && bytes.len() > 1000);
        let e = draw(Path::new("/nonexistent/map.png"), "test", &layers, &counts, 50).unwrap_err();
        assert!(e.starts_with("/nonexistent/map.png: "), "{e}");
    }
}
