//! A picture of what happened to the optimizer's pages during a step: an SVG, or a trace for Chrome's viewer (Perfetto).
//!
//! Times are those of the host: when it gave an order, not when the device carried it out.

use crate::{paging::Paging, report::bytes};
use anyhow::{Context, Result};
use nibble_models::files::atomic::atomic_write;
use nibble_runtime::pager::{Moment, Pager, Trace, What};
use plotters::{coord::Shift, prelude::*};
use serde_json::{Value, json};
use std::{collections::BTreeMap, ops::Range, path::Path};

/// Begins recording, if there is to be a picture.
pub fn begin(path: Option<&Path>, paging: Option<&Paging>) {
    match (path, paging) {
        (Some(path), None) => {
            eprintln!("there is no {} to draw: this run has no pages (--paged-budget auto or a size)", path.display());
        }
        (Some(_), Some(paging)) => drop(paging.state.pager().trace(true)),
        (None, _) => {}
    }
}

/// Ends recording, and writes the picture. A picture that cannot be written is said to be missing; the run is worth more.
pub fn finish(path: Option<&Path>, paging: Option<&Paging>) {
    let (Some(path), Some(paging)) = (path, paging) else { return };
    let pager = paging.state.pager();
    let Some(trace) = pager.trace(false) else { return };
    match write(path, &title(pager), pager.pages(), &trace) {
        Ok(()) => eprintln!("pages of the last step: {}", path.display()),
        Err(error) => eprintln!("the picture of the pages was not written: {error:#}"),
    }
}

/// What the pages are, and how many may be where.
fn title(pager: &Pager) -> String {
    let (pages, page, budget) = (pager.pages(), pager.page_bytes(), pager.budget());
    format!(
        "{pages} pages of {} in {}, at most {} ({:.0} %) on the device, policy {}",
        bytes(page),
        pager.store_name(),
        bytes(budget),
        100.0 * budget as f64 / (pages * page).max(1) as f64,
        pager.policy()
    )
}

fn write(path: &Path, title: &str, pages: usize, trace: &Trace) -> Result<()> {
    let text = match path.extension().is_some_and(|end| end == "json") {
        true => chrome(title, trace).to_string(),
        false => svg(title, pages, trace).context("drawing pages")?,
    };
    Ok(atomic_write(path, |out| out.write_all(text.as_bytes()))?)
}

/// Everything that happens to pages, as it is called in pictures. What is drawn later lies on top.
const KINDS: [(What, &str, RGBColor); 7] = [
    (What::Store, "gradient stored", RGBColor(150, 110, 190)),
    (What::Resident, "used on the device", RGBColor(31, 87, 160)),
    (What::InPlace, "used across the bus", RGBColor(230, 140, 20)),
    (What::Stage, "streamed in", RGBColor(45, 150, 85)),
    (What::Unstage, "streamed out", RGBColor(150, 200, 60)),
    (What::Bring, "brought to the device", RGBColor(20, 175, 195)),
    (What::Evict, "evicted", RGBColor(210, 50, 50)),
];

/// The background of pages in device memory.
const RESIDENT: RGBColor = RGBColor(210, 225, 243);

/// When a page was in device memory, in seconds; pages that follow one another and have the same times are together.
fn residency(pages: usize, trace: &Trace, end: f64) -> Vec<(Range<usize>, Vec<Range<f64>>)> {
    let mut since: BTreeMap<usize, f64> = trace.resident.iter().map(|&page| (page, 0.0)).collect();
    let mut times: Vec<Vec<Range<f64>>> = vec![Vec::new(); pages];
    for Moment { at, pages, what } in &trace.moments {
        for page in pages.clone() {
            match what {
                What::Bring => drop(since.insert(page, *at)),
                What::Evict => times[page].extend(since.remove(&page).map(|start| start..*at)),
                _ => {}
            }
        }
    }
    since.into_iter().for_each(|(page, start)| times[page].push(start..end));
    let mut groups: Vec<(Range<usize>, Vec<Range<f64>>)> = Vec::new();
    for (page, times) in times.into_iter().enumerate() {
        match groups.last_mut() {
            Some((pages, same)) if *same == times => pages.end = page + 1,
            _ => groups.push((page..page + 1, times)),
        }
    }
    groups
}

/// The picture: time to the right, pages upward. The last sweep, which takes little of the host's time, has its own scale.
fn svg(title: &str, pages: usize, trace: &Trace) -> Result<String> {
    let end = trace.moments.last().map_or(0.0, |last| last.at);
    let sweep = trace.sweeps.last().copied().unwrap_or(end).min(end);
    // What happens at the very end is to be seen too.
    let end = end + ((end - sweep) / 50.0).max(1e-6);
    let mut picture = String::new();
    {
        let (width, height) = (1000, 560);
        let area = SVGBackend::with_string(&mut picture, (width, height)).into_drawing_area();
        area.fill(&WHITE)?;
        let (head, rest) = area.split_vertically(84);
        let (body, foot) = rest.split_vertically(height - 84 - 28);
        heading(&head, title, trace)?;
        let (left, right) = body.split_horizontally(width * 52 / 100);
        let bands = residency(pages, trace, end);
        panel(&left, "forward and backward passes", pages, 0.0..sweep, &bands, trace)?;
        panel(&right, "the update's sweep", pages, sweep..end, &bands, trace)?;
        let note = "Each mark is where the host gave the order; the device follows in its own time.";
        foot.draw(&Text::new(note, (24, 4), ("sans-serif", 13).into_font().color(&BLACK.mix(0.6))))?;
        area.present()?;
    }
    Ok(picture)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The title, and what the colours that are to be seen mean.
fn heading(area: &Area, title: &str, trace: &Trace) -> Result<()> {
    area.draw(&Text::new(title, (24, 12), ("sans-serif", 18)))?;
    let seen = KINDS.iter().filter(|(kind, ..)| trace.moments.iter().any(|moment| moment.what == *kind));
    let names = [("in device memory", RESIDENT)].into_iter().chain(seen.map(|&(_, name, color)| (name, color)));
    for (i, (name, color)) in names.enumerate() {
        let (x, y) = (24 + 236 * (i as i32 / 2), 42 + 20 * (i as i32 % 2));
        area.draw(&Rectangle::new([(x, y), (x + 14, y + 12)], color.filled()))?;
        area.draw(&Text::new(name, (x + 20, y), ("sans-serif", 14)))?;
    }
    Ok(())
}

/// Draws what happened in `span` (seconds), counted from its beginning.
fn panel(
    area: &Area,
    caption: &str,
    pages: usize,
    span: Range<f64>,
    bands: &[(Range<usize>, Vec<Range<f64>>)],
    trace: &Trace,
) -> Result<()> {
    let ms = |at: f64| 1e3 * (at - span.start);
    let length = ms(span.end).max(1e-3);
    let mut chart = ChartBuilder::on(area)
        .caption(caption, ("sans-serif", 16))
        .margin(10)
        .margin_left(14)
        .x_label_area_size(38)
        .y_label_area_size(50)
        .build_cartesian_2d(0.0..length, 0.0..pages.max(1) as f64)?;
    let decimals = if length < 1.0 { 2 } else { usize::from(length < 10.0) };
    chart
        .configure_mesh()
        .disable_mesh()
        .label_style(("sans-serif", 13))
        .x_desc("ms")
        .y_desc("page")
        .x_labels(6)
        .y_labels(pages.clamp(2, 10))
        .x_label_formatter(&|x| format!("{x:.decimals$}"))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .draw()?;
    let block = |pages: &Range<usize>, from: f64, to: f64, color: RGBColor| {
        Rectangle::new([(from, pages.start as f64), (to, pages.end as f64)], color.filled())
    };
    let during = bands.iter().flat_map(|(pages, times)| times.iter().map(move |time| (pages, time)));
    let during = during.filter(|(_, time)| time.start < span.end && time.end > span.start);
    chart.draw_series(
        during.map(|(pages, time)| block(pages, ms(time.start).max(0.0), ms(time.end).min(length), RESIDENT)),
    )?;
    // Moments have no length; this wide they can be seen.
    let wide = length / 130.0;
    for (kind, _, color) in KINDS {
        let here = trace.moments.iter().filter(|moment| moment.what == kind && span.contains(&moment.at));
        chart.draw_series(
            here.map(|Moment { at, pages, .. }| block(pages, ms(*at), (ms(*at) + wide).min(length), color)),
        )?;
    }
    Ok(())
}

/// Events in the format of Chrome's trace viewer: a row a kind, and how many pages are on the device. Times are in µs.
fn chrome(title: &str, trace: &Trace) -> Value {
    let row = |what: What| KINDS.iter().position(|(kind, ..)| *kind == what).unwrap_or(KINDS.len());
    let mut events = vec![json!({"ph": "M", "pid": 1, "name": "process_name", "args": {"name": title}})];
    for (what, name, _) in KINDS {
        let id = row(what);
        events.push(json!({"ph": "M", "pid": 1, "tid": id, "name": "thread_name", "args": {"name": name}}));
        events.push(json!({"ph": "M", "pid": 1, "tid": id, "name": "thread_sort_index", "args": {"sort_index": id}}));
    }
    let mut resident = trace.resident.len();
    let count = |at: f64, pages: usize| json!({"ph": "C", "pid": 1, "name": "pages on the device", "ts": 1e6 * at, "args": {"pages": pages}});
    events.push(count(0.0, resident));
    for &at in &trace.sweeps {
        events.push(json!({"ph": "i", "s": "p", "pid": 1, "tid": 0, "name": "a sweep begins", "ts": 1e6 * at}));
    }
    for Moment { at, pages, what } in &trace.moments {
        let name = match pages.len() {
            1 => format!("page {}", pages.start),
            _ => format!("pages {} to {}", pages.start, pages.end - 1),
        };
        let args = json!({"first": pages.start, "pages": pages.len()});
        events.push(json!({
            "ph": "i", "s": "t", "pid": 1, "tid": row(*what), "name": name, "ts": 1e6 * at, "args": args
        }));
        match what {
            What::Bring => resident += pages.len(),
            What::Evict => resident = resident.saturating_sub(pages.len()),
            _ => continue,
        }
        events.push(count(*at, resident));
    }
    json!({"displayTimeUnit": "ms", "otherData": {"times": "when the host gave the order"}, "traceEvents": events})
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A step with twelve pages, of which four stay and lanes stream the others two at a time; one was evicted on the way
    /// and returns.
    fn made_up() -> Trace {
        let mut trace = Trace::new((0..5).collect());
        let mut push = |at: f64, pages: Range<usize>, what| trace.moments.push(Moment { at: at * 1e-3, pages, what });
        for page in (0..12).rev() {
            push(40.0 + 3.0 * (12 - page) as f64, page..page + 1, What::Store);
            if page == 6 {
                push(59.0, 4..5, What::Evict);
            }
        }
        push(79.0, 0..4, What::Resident);
        push(80.1, 4..5, What::Bring);
        push(80.2, 0..5, What::Resident);
        push(80.25, 5..6, What::InPlace);
        for first in (6..12).step_by(2) {
            push(80.3 + 0.1 * (first - 6) as f64, first..first + 2, What::Stage);
            push(80.4 + 0.1 * (first - 6) as f64, first..first + 2, What::Unstage);
        }
        trace.sweeps = vec![80e-3];
        trace
    }

    #[test]
    fn pages_are_resident_from_when_they_are_brought_until_they_are_evicted() {
        let seen = residency(12, &made_up(), 1.0);
        let at = |page: usize| &seen.iter().find(|(pages, _)| pages.contains(&page)).unwrap().1;
        assert_eq!(seen.len(), 3);
        assert_eq!((at(0), at(3)), (&vec![0.0..1.0], &vec![0.0..1.0]));
        assert_eq!(at(4), &vec![0.0..59.0 * 1e-3, 80.1 * 1e-3..1.0]);
        assert!(at(5).is_empty() && at(11).is_empty());
        let mut gone = Trace::new(vec![0]);
        gone.moments.push(Moment { at: 0.5, pages: 0..1, what: What::Evict });
        assert_eq!(residency(1, &gone, 1.0), [(0..1, vec![0.0..0.5])]);
    }

    #[test]
    fn the_picture_has_every_moment_where_it_belongs() {
        let text = svg("twelve pages", 12, &made_up()).unwrap();
        let count = |color: RGBColor| {
            let RGBColor(r, g, b) = color;
            text.matches(&format!("fill=\"#{r:02X}{g:02X}{b:02X}\"")).count()
        };
        for (what, name, color) in KINDS {
            let moments = made_up().moments.iter().filter(|moment| moment.what == what).count();
            assert_eq!(count(color), moments + 1, "{name}, and its mark in the legend");
            assert!(text.contains(name));
        }
        // Pages 0 to 3 in both panels, page 4 before and after it was away, and the legend.
        assert_eq!(count(RESIDENT), 2 + 2 + 1);
        assert!(text.contains("twelve pages") && text.contains("where the host gave the order"));
        // What did not happen is not explained.
        let mut calm = made_up();
        calm.moments.retain(|moment| moment.what != What::Evict);
        assert!(!svg("", 12, &calm).unwrap().contains("evicted"));
    }

    #[test]
    fn chrome_gets_a_row_a_kind_and_the_number_of_resident_pages() {
        let trace = chrome("twelve pages", &made_up());
        let events = trace["traceEvents"].as_array().unwrap();
        let of = |ph: &str| events.iter().filter(|event| event["ph"] == ph).cloned().collect::<Vec<_>>();
        let counts: Vec<_> = of("C").iter().map(|event| event["args"]["pages"].as_u64().unwrap()).collect();
        assert_eq!(counts, [5, 4, 5]);
        let instants = of("i");
        assert_eq!(instants.len(), made_up().moments.len() + 1);
        let evicted = instants.iter().find(|event| event["tid"] == 6).unwrap();
        assert_eq!((&evicted["name"], evicted["ts"].as_f64().unwrap().round()), (&json!("page 4"), 59_000.0));
        let rows = of("M").iter().filter(|event| event["name"] == "thread_name").count();
        assert_eq!(rows, KINDS.len());
    }

    #[test]
    fn files_appear_by_their_ending_and_even_without_moments() {
        let dir = tempfile::tempdir().unwrap();
        for (name, start) in [("a.json", "{"), ("a.svg", "<svg")] {
            for trace in [made_up(), Trace::new(Vec::new())] {
                write(&dir.path().join(name), "pages", 12, &trace).unwrap();
                assert!(std::fs::read_to_string(dir.path().join(name)).unwrap().starts_with(start));
            }
        }
        assert!(write(&dir.path().join("absent/a.svg"), "pages", 12, &made_up()).is_err());
    }
}
