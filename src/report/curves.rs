//! Curves over the steps of runs, as SVG pictures.

use super::{StepMetrics, smooth};
use anyhow::Result;
use plotters::prelude::*;

/// Points that a curve is drawn with at most: more than a screen shows, and a long run stays a small file.
const POINTS: usize = 2000;
/// Dark colours that are told apart, a pale one of each for what lies behind a running mean.
const COLOURS: [(RGBColor, RGBColor); 6] = [
    (RGBColor(31, 87, 160), RGBColor(170, 196, 228)),
    (RGBColor(192, 80, 20), RGBColor(240, 200, 172)),
    (RGBColor(30, 130, 76), RGBColor(178, 220, 194)),
    (RGBColor(130, 60, 160), RGBColor(216, 190, 228)),
    (RGBColor(150, 120, 0), RGBColor(228, 216, 160)),
    (RGBColor(90, 90, 90), RGBColor(206, 206, 206)),
];

/// A named line.
#[derive(Clone, Debug)]
pub struct Curve {
    pub name: String,
    /// (step, value); what is not finite is left out.
    pub points: Vec<(f64, f64)>,
    /// Its number among colours.
    pub colour: usize,
    /// Whether it lies behind another of its colour.
    pub pale: bool,
}

/// The loss of every step with its running mean, and of the evaluations, where there are any.
pub fn losses(steps: &[StepMetrics]) -> Vec<Curve> {
    let mut curves = vec![
        Curve { name: "each step".into(), points: values(steps, |step| Some(step.loss)), colour: 0, pale: true },
        Curve { name: "running mean".into(), points: running_mean(steps), colour: 0, pale: false },
    ];
    let evaluated = values(steps, |step| step.eval_nll);
    if !evaluated.is_empty() {
        curves.push(Curve { name: "held out".into(), points: evaluated, colour: 1, pale: false });
    }
    curves
}

/// The running mean of the loss.
pub fn running_mean(steps: &[StepMetrics]) -> Vec<(f64, f64)> {
    let mut mean = None;
    let mut next = |step: &StepMetrics| {
        let value = smooth(mean, step.loss);
        mean = Some(value);
        (f64::from(step.step), value)
    };
    steps.iter().map(&mut next).collect()
}

/// One value of every step that has it.
pub fn values(steps: &[StepMetrics], value: impl Fn(&StepMetrics) -> Option<f64>) -> Vec<(f64, f64)> {
    steps.iter().filter_map(|step| Some((f64::from(step.step), value(step)?))).collect()
}

/// Draws curves from 0 up.
///
/// # Errors
/// The picture cannot be made.
pub fn draw(title: &str, unit: &str, curves: &[Curve]) -> Result<String> {
    let thinned: Vec<Vec<(f64, f64)>> = curves.iter().map(|curve| thin(&curve.points)).collect();
    let finite = || thinned.iter().flatten();
    let top = finite().map(|&(_, value)| value).fold(0.0, f64::max);
    let last = finite().map(|&(step, _)| step).fold(2.0, f64::max);
    let top = if top > 0.0 { 1.05 * top } else { 1e-3 };
    let mut picture = String::new();
    {
        let area = SVGBackend::with_string(&mut picture, (800, 480)).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(72)
            .build_cartesian_2d(1.0..last, 0.0..top)?;
        let label = |value: &f64| if top < 0.01 { format!("{value:.1e}") } else { format!("{value}") };
        let whole = |step: &f64| format!("{step:.0}");
        let mut mesh = chart.configure_mesh();
        mesh.x_desc("step").y_desc(unit).light_line_style(WHITE);
        mesh.x_label_formatter(&whole).y_label_formatter(&label).draw()?;
        for (curve, points) in curves.iter().zip(thinned) {
            let (strong, pale) = COLOURS[curve.colour % COLOURS.len()];
            let style = if curve.pale { pale.stroke_width(1) } else { strong.stroke_width(2) };
            // One point alone makes no line.
            let dots: Vec<_> =
                points.iter().filter(|_| points.len() == 1).map(|&at| Circle::new(at, 3, style)).collect();
            chart.draw_series(dots)?;
            chart
                .draw_series(LineSeries::new(points, style))?
                .label(&curve.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        }
        if curves.len() > 1 {
            chart.configure_series_labels().border_style(BLACK.mix(0.3)).background_style(WHITE).draw()?;
        }
        area.present()?;
    }
    Ok(picture)
}

/// Means over stretches of the finite points, few enough to draw.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> = points.iter().copied().filter(|(_, value)| value.is_finite()).collect();
    let mean = |stretch: &[(f64, f64)]| {
        let count = stretch.len() as f64;
        let sum = stretch.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (sum.0 / count, sum.1 / count)
    };
    finite.chunks(finite.len().div_ceil(POINTS).max(1)).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_curves_are_thinned_to_their_means() {
        let points: Vec<(f64, f64)> = (0..10_000).map(|i| (f64::from(i), f64::from(i % 5))).collect();
        let thinned = thin(&points);
        assert_eq!(thinned.len(), 2000);
        assert!(thinned.iter().all(|&(_, value)| value == 2.0));
        assert_eq!(thinned[1], (7.0, 2.0));
        assert_eq!(thin(&[(1.0, f64::NAN), (2.0, 3.0)]), [(2.0, 3.0)]);
    }

    #[test]
    fn any_curves_are_drawn() {
        let curve =
            |points: &[(f64, f64)]| Curve { name: "a<b".into(), points: points.to_vec(), colour: 9, pale: false };
        for points in [&[][..], &[(1.0, 0.0)], &[(1.0, 2e-5)], &[(1.0, f64::INFINITY)], &[(1.0, 2.0), (2.0, 1e9)]] {
            let picture = draw("t & t", "u", &[curve(points), curve(points)]).unwrap();
            assert!(
                picture.starts_with("<svg") && picture.contains("a&lt;b") && picture.contains("t &amp; t"),
                "{picture}"
            );
        }
    }
}
