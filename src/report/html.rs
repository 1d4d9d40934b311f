//! A run, or several, as one HTML file that needs no other.

use super::curves::{Curve, draw, losses, values};
use super::{StepMetrics, bytes};
use crate::eval::{Answer, EvalResult};
use anyhow::Result;
use nibble_runtime::{Device, memory};
use serde::{Deserialize, Serialize};
use std::fmt::Write;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}\
    h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}svg{max-width:100%;height:auto;display:block;margin:1rem 0}\
    table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.3rem .8rem .3rem 0;vertical-align:top;\
    border-bottom:1px solid #ddd}td.text{white-space:pre-wrap;overflow-wrap:anywhere}pre{background:#f4f4f4;padding:1rem;\
    overflow-x:auto}.bar{background:#1f57a0;height:.8rem;display:block;min-width:1px}.changed td{font-weight:600}";

/// Answers to the same prompts, before and after training: `samples.json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Samples {
    pub before: Vec<Answer>,
    pub after: Vec<Answer>,
}

/// What a report is about.
pub struct Report<'a> {
    /// What the run is called.
    pub name: String,
    /// Lines of a table: what, value.
    pub facts: Vec<(&'static str, String)>,
    pub steps: &'a [StepMetrics],
    pub before: Option<EvalResult>,
    pub after: Option<EvalResult>,
    pub device: Device,
    pub samples: &'a Samples,
    /// The exact settings, as text.
    pub settings: String,
}

/// The report as HTML.
///
/// # Errors
/// A picture cannot be made.
pub fn report(report: &Report) -> Result<String> {
    let Report { name, facts, steps, before, after, device, samples, settings } = report;
    let mut out = head(name);
    let mut rows: Vec<Vec<String>> = facts.iter().map(|(what, value)| vec![what.to_string(), value.clone()]).collect();
    let evaluated = [("held out before", before), ("held out after", after)];
    rows.extend(
        evaluated.iter().filter_map(|(what, result)| Some(vec![what.to_string(), result.as_ref()?.to_string()])),
    );
    out += &table(&[], &rows);
    out += "<h2>Curves</h2>\n";
    out += &draw("loss", "nats a token", &losses(steps))?;
    let one = |title: &str, unit: &str, value: fn(&StepMetrics) -> f64| {
        let points = values(steps, |step| Some(value(step)));
        draw(title, unit, &[Curve { name: title.into(), points, colour: 0, pale: false }])
    };
    out += &one("learning rate", "", |step| step.lr)?;
    out += &one("gradient norm, before clipping", "", |step| step.grad_norm)?;
    out += &one("speed", "tokens a second", |step| step.tok_s)?;
    out += "<h2>Peak memory</h2>\n";
    out += &memory_table(*device);
    if !samples.before.is_empty() || !samples.after.is_empty() {
        out += "<h2>Samples</h2>\n";
        out += &samples_table(samples);
    }
    let _ = writeln!(out, "<h2>Settings</h2>\n<pre>{}</pre>", escaped(settings));
    Ok(out + "</body></html>\n")
}

/// The start of a page.
pub fn head(title: &str) -> String {
    let title = escaped(title);
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n"
    )
}

/// A table of texts.
pub fn table(names: &[String], rows: &[Vec<String>]) -> String {
    let mut out = "<table>\n".to_owned();
    if !names.is_empty() {
        let names: String = names.iter().map(|name| format!("<th>{}</th>", escaped(name))).collect();
        let _ = writeln!(out, "<tr>{names}</tr>");
    }
    for row in rows {
        let cells: String = row.iter().map(|cell| format!("<td class=\"text\">{}</td>", escaped(cell))).collect();
        let _ = writeln!(out, "<tr>{cells}</tr>");
    }
    out + "</table>\n"
}

/// Peak bytes by tag, with a bar each.
fn memory_table(device: Device) -> String {
    let usage = memory::usage_of(device);
    let most = usage.peak.iter().copied().max().unwrap_or(0).max(1);
    let mut out = "<table>\n".to_owned();
    for (tag, peak) in memory::Tag::ALL.iter().zip(usage.peak).filter(|(_, peak)| *peak > 0) {
        let share = 100.0 * peak as f64 / most as f64;
        let _ = writeln!(
            out,
            "<tr><td>{tag}</td><td>{}</td><td style=\"width:60%\"><span class=\"bar\" style=\"width:{share:.1}%\"></span></td></tr>",
            bytes(peak)
        );
    }
    let _ = writeln!(out, "<tr><td>all at once</td><td>{}</td><td></td></tr>", bytes(usage.total_peak));
    out + "</table>\n"
}

fn samples_table(Samples { before, after }: &Samples) -> String {
    let names = ["prompt", "expected", "before", "after"].map(str::to_owned);
    let asked = if before.is_empty() { after } else { before };
    let found =
        |answers: &[Answer], number: usize| answers.get(number).map_or(String::new(), |answer| answer.found.clone());
    let rows: Vec<Vec<String>> = asked
        .iter()
        .enumerate()
        .map(|(i, Answer { prompt, expected, .. })| {
            vec![prompt.clone(), expected.clone(), found(before, i), found(after, i)]
        })
        .collect();
    table(&names, &rows)
}

/// Text that HTML shows as it is.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_models_and_users_do_not_become_html() {
        let evil = "</td><script>alert(1)</script>&\"".to_owned();
        let answer = Answer { prompt: evil.clone(), expected: evil.clone(), found: evil.clone() };
        let samples = Samples { before: vec![answer.clone()], after: vec![answer] };
        let page = report(&Report {
            name: evil.clone(),
            facts: vec![("model", evil.clone())],
            steps: &[],
            before: None,
            after: None,
            device: Device::Cpu,
            samples: &samples,
            settings: evil,
        });
        let page = page.unwrap();
        assert!(!page.contains("<script>") && !page.contains("</td><script"));
        assert_eq!(page.matches("&lt;script&gt;alert(1)&lt;/script&gt;&amp;&quot;").count(), 2 + 1 + 4 + 1);
        assert_eq!(page.matches("<svg").count(), 4);
        // Nothing is loaded from elsewhere.
        assert!(!page.contains("src=") && !page.contains("href=") && !page.contains("url("));
    }
}
