//! `loss.svg`: the learning curves as a small hand-written picture.

use std::fmt::Write;

/// Data of a chart; all values in one unit.
pub struct Chart<'a> {
    /// Name of the unit.
    pub unit: &'a str,
    /// `(step, value)` of every training step.
    pub train: &'a [(u64, f64)],
    /// `(step, value)` of every validation.
    pub validation: &'a [(u64, f64)],
    /// A horizontal line to compare with: its name and value.
    pub reference: Option<(&'a str, f64)>,
}

const WIDTH: f64 = 840.0;
const HEIGHT: f64 = 500.0;
/// The area between the axes.
const LEFT: f64 = 70.0;
const RIGHT: f64 = WIDTH - 30.0;
const TOP: f64 = 54.0;
const BOTTOM: f64 = HEIGHT - 62.0;

const TRAIN: &str = "#4c78a8";
const VALIDATION: &str = "#e4572e";
const REFERENCE: &str = "#6b7280";

/// More points than this along one curve cannot be told apart.
const MOST_POINTS: usize = 1000;

impl Chart<'_> {
    /// The picture as an SVG document.
    pub fn svg(&self) -> String {
        let train = thin(self.train);
        let validation = thin(self.validation);
        let reference = self.reference.filter(|(_, value)| value.is_finite());
        let curves = || train.iter().chain(&validation);
        let values = || curves().map(|&(_, y)| y).chain(reference.map(|(_, y)| y));

        let last = curves().fold(0.0f64, |last, &(x, _)| last.max(x));
        let x = Axis::new(0.0, last.max(1.0), false, (LEFT, RIGHT));
        let (low, high) = values().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), y| (low.min(y), high.max(y)));
        let (low, high) = if low <= high { (low, high) } else { (0.0, 8.0) };
        let y = Axis::new(low, high, true, (BOTTOM, TOP));

        let mut svg = frame(&x, &y, self.unit);
        if let Some((_, value)) = reference {
            let at = y.place(value);
            let _ = writeln!(
                svg,
                r##"<line x1="{LEFT}" x2="{RIGHT}" y1="{at:.1}" y2="{at:.1}" stroke="{REFERENCE}" stroke-width="1.5" stroke-dasharray="6 4"/>"##
            );
        }
        // The noise of single batches stays visible beneath their mean.
        svg += &curve(&x, &y, &train, TRAIN, 1.0, 0.4);
        svg += &curve(&x, &y, &smooth(&train), TRAIN, 2.0, 1.0);
        svg += &curve(&x, &y, &validation, VALIDATION, 2.0, 1.0);
        for &(step, value) in validation.iter().filter(|_| validation.len() <= 60) {
            let _ = writeln!(
                svg,
                r#"<circle cx="{:.1}" cy="{:.1}" r="3.2" fill="{VALIDATION}"/>"#,
                x.place(step),
                y.place(value)
            );
        }
        svg += &self.legend(reference);
        svg + "</svg>\n"
    }

    /// The names of the curves with their last values, at the top right, which falling curves leave free.
    fn legend(&self, reference: Option<(&str, f64)>) -> String {
        let last = |points: &[(u64, f64)]| points.last().map(|&(_, value)| value);
        let rows = [
            last(self.train).map(|value| ("train", value, TRAIN, "")),
            last(self.validation).map(|value| ("validation", value, VALIDATION, "")),
            reference.map(|(name, value)| (name, value, REFERENCE, r#" stroke-dasharray="6 4""#)),
        ];
        let mut svg = String::new();
        let left = RIGHT - 230.0;
        for (row, (name, value, color, dashes)) in rows.into_iter().flatten().enumerate() {
            let top = TOP + 18.0 + 22.0 * row as f64;
            let _ = writeln!(
                svg,
                r#"<line x1="{left}" x2="{}" y1="{top}" y2="{top}" stroke="{color}" stroke-width="2"{dashes}/>"#,
                left + 28.0
            );
            let _ = writeln!(svg, r#"<text x="{}" y="{}">{}</text>"#, left + 38.0, top + 4.5, escape(name));
            let _ =
                writeln!(svg, r#"<text x="{}" y="{}" text-anchor="end">{value:.3}</text>"#, RIGHT - 10.0, top + 4.5);
        }
        svg
    }
}

/// The opening tag, background, title, grid, ticks and labels.
fn frame(x: &Axis, y: &Axis, unit: &str) -> String {
    let mut svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-family="system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif" font-size="13" fill="#374151">
<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>
<text x="{LEFT}" y="32" font-size="17" font-weight="600" fill="#111827">Loss in {unit}</text>
"##
    );
    for (value, label) in y.ticks() {
        let at = y.place(value);
        let _ = writeln!(
            svg,
            r##"<line x1="{LEFT}" x2="{RIGHT}" y1="{at:.1}" y2="{at:.1}" stroke="#e5e7eb"/><text x="{}" y="{:.1}" text-anchor="end">{label}</text>"##,
            LEFT - 10.0,
            at + 4.5
        );
    }
    for (value, label) in x.ticks() {
        let at = x.place(value);
        let _ = writeln!(
            svg,
            r##"<line x1="{at:.1}" x2="{at:.1}" y1="{BOTTOM}" y2="{}" stroke="#9ca3af"/><text x="{at:.1}" y="{}" text-anchor="middle">{label}</text>"##,
            BOTTOM + 5.0,
            BOTTOM + 21.0
        );
    }
    let (middle, below) = ((LEFT + RIGHT) / 2.0, BOTTOM + 46.0);
    let _ = writeln!(svg, r##"<line x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}" stroke="#9ca3af"/>"##);
    let _ = writeln!(svg, r#"<text x="{middle}" y="{below}" text-anchor="middle">step</text>"#);
    svg
}

/// A line through the points.
fn curve(x: &Axis, y: &Axis, points: &[(f64, f64)], color: &str, width: f64, opacity: f64) -> String {
    if points.is_empty() {
        return String::new();
    }
    let path = points.iter().map(|&(step, value)| format!("{:.1},{:.1}", x.place(step), y.place(value)));
    format!(
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"{width}\" stroke-opacity=\"{opacity}\" \
         stroke-linejoin=\"round\" stroke-linecap=\"round\"/>\n",
        path.collect::<Vec<_>>().join(" ")
    )
}

/// Means of equally long runs of points, few enough to draw; the finite ones alone.
fn thin(points: &[(u64, f64)]) -> Vec<(f64, f64)> {
    let finite: Vec<_> = points.iter().filter(|(_, y)| y.is_finite()).map(|&(x, y)| (x as f64, y)).collect();
    finite.chunks(finite.len().div_ceil(MOST_POINTS).max(1)).map(mean).collect()
}

/// Each point replaced by the mean of its neighbourhood, which shrinks at both ends and so keeps them in place.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let most = points.len() / 50;
    (0..points.len())
        .map(|i| {
            let reach = most.min(i).min(points.len() - 1 - i);
            mean(&points[i - reach..=i + reach])
        })
        .collect()
}

fn mean(points: &[(f64, f64)]) -> (f64, f64) {
    let (x, y) = points.iter().fold((0.0, 0.0), |(x, y), point| (x + point.0, y + point.1));
    (x / points.len() as f64, y / points.len() as f64)
}

/// A linear axis with ticks at multiples of 1, 2 or 5 times a power of ten.
struct Axis {
    low: f64,
    high: f64,
    step: f64,
    /// Where `low` and `high` are drawn.
    ends: (f64, f64),
}

impl Axis {
    /// `whole` extends the axis to the ticks around the values.
    fn new(low: f64, high: f64, whole: bool, ends: (f64, f64)) -> Self {
        let high = if high > low { high } else { low + 1.0 };
        let raw = (high - low) / 7.0;
        let power = 10f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|&step| step >= raw);
        let step = step.unwrap_or(10.0 * power);
        if whole {
            let (low, high) = ((low / step).floor() * step, (high / step).ceil() * step);
            return Self { low, high, step, ends };
        }
        // Steps are whole numbers.
        Self { low, high, step: step.max(1.0), ends }
    }

    fn place(&self, value: f64) -> f64 {
        self.ends.0 + (value - self.low) / (self.high - self.low) * (self.ends.1 - self.ends.0)
    }

    /// Values and labels of the ticks.
    fn ticks(&self) -> Vec<(f64, String)> {
        let digits = (-self.step.log10().floor()).max(0.0) as usize;
        let count = ((self.high - self.low) / self.step + 1e-9).floor() as usize;
        (0..=count)
            .map(|i| {
                let value = self.low + i as f64 * self.step;
                (value, format!("{value:.digits$}"))
            })
            .collect()
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::{Axis, Chart, smooth, thin};

    #[test]
    fn ticks_are_round_and_cover_the_values() {
        let axis = Axis::new(1.93, 8.02, true, (0.0, 1.0));
        let labels: Vec<String> = axis.ticks().into_iter().map(|(_, label)| label).collect();
        assert_eq!(labels, ["1", "2", "3", "4", "5", "6", "7", "8", "9"]);
        let axis = Axis::new(2.31, 2.52, true, (0.0, 1.0));
        let labels: Vec<String> = axis.ticks().into_iter().map(|(_, label)| label).collect();
        assert_eq!(labels.first().map(String::as_str), Some("2.30"));
        assert_eq!(labels.last().map(String::as_str), Some("2.55"));
        let steps: Vec<f64> = Axis::new(0.0, 3.0, false, (0.0, 1.0)).ticks().into_iter().map(|(at, _)| at).collect();
        assert_eq!(steps, [0.0, 1.0, 2.0, 3.0]);
    }

    #[test]
    fn every_curve_is_a_whole_document_of_finite_numbers() {
        let points: Vec<(u64, f64)> = (0..5000).map(|i| (i, 8.0 / (1.0 + i as f64 / 100.0))).collect();
        for count in [0, 1, 2, 100, 5000] {
            let mut train = points[..count].to_vec();
            if let Some(last) = train.last_mut() {
                last.1 = f64::NAN;
            }
            let validation: Vec<_> = points[..count].iter().step_by(100).copied().collect();
            let svg = Chart {
                unit: "bits per byte",
                train: &train,
                validation: &validation,
                reference: Some(("order <2>", 3.0)),
            }
            .svg();
            assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
            assert!(svg.contains("order &lt;2&gt;"));
            let drawn = svg.replace(">NaN</text>", "");
            assert!(!drawn.contains("NaN") && !drawn.contains("inf"), "{count}");
        }
    }

    #[test]
    fn thinning_and_smoothing_keep_the_mean() {
        let line: Vec<(u64, f64)> = (0..4001).map(|i| (i, i as f64)).collect();
        let thinned = thin(&line);
        assert!(thinned.len() <= 1000 && thinned.iter().all(|(x, y)| x == y));
        let smoothed = smooth(&thinned);
        assert_eq!(smoothed.len(), thinned.len());
        assert_eq!((smoothed[0], smoothed[smoothed.len() - 1]), (thinned[0], thinned[thinned.len() - 1]));
    }
}
