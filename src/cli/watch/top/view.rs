//! Draws what `model.rs` has, on any size of terminal from 40 columns and 10 lines on.

use super::super::words::{bytes, count, time};
use super::model::{Line as Entry, Mode, Model, Tab};
use ratatui::Frame;
use ratatui::layout::{Constraint, Flex, Layout, Rect};
use ratatui::style::{Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Bar, BarChart, BarGroup, Block, Clear, Gauge, Paragraph, Row, Table, TableState};

/// Lines of the histogram with its frame, where there is room for it.
const HISTOGRAM: u16 = 8;

const KEYS: &str = "\
Tab        sessions, connections, message types
Up, Down   choose a line
s, r       sort by the next column, or the other way round
/          show only lines that contain a text
k          end the session of the chosen line, after a question
q          leave

Rates are of the last interval. `long` are calls of several
frames, or answered from elsewhere; `waiting` are entries and
answers that lie in the rings.";

pub fn draw(frame: &mut Frame<'_>, model: &Model) {
    let area = frame.area();
    let reactors = model.report.reactors.len().div_ceil(2).clamp(1, 4) as u16;
    let histogram = if area.height >= 20 { HISTOGRAM } else { 0 };
    let [title, memory, busy, times, list, footer] = Layout::vertical([
        Constraint::Length(2),
        Constraint::Length(1),
        Constraint::Length(reactors),
        Constraint::Length(histogram),
        Constraint::Min(3),
        Constraint::Length(1),
    ])
    .areas(area);
    frame.render_widget(head(model), title);
    draw_memory(frame, model, memory);
    draw_reactors(frame, model, busy);
    if histogram > 0 {
        draw_histogram(frame, model, times);
    }
    draw_list(frame, model, list);
    frame.render_widget(foot(model), footer);
    match model.mode {
        Mode::Help => popup(frame, "keys", KEYS),
        Mode::Confirm(whom) => {
            let question =
                format!("End session {}? Its client is told.\n\ny: yes, any other key: no", whom.session);
            popup(frame, "end a session", &question);
        }
        Mode::List | Mode::Filter => {}
    }
}

fn head(model: &Model) -> Paragraph<'_> {
    let of = |name| model.report.counter(name);
    let first = format!(
        "doorbell {}  sessions {}  connections {}  calls {}/s  in {}/s  out {}/s",
        model.report.pid,
        of("sessions_open"),
        of("connections_open"),
        count(model.rate_of("calls")),
        bytes(model.rate_of("bytes_in")),
        bytes(model.rate_of("bytes_out")),
    );
    let not_ok = model.rate_of("calls").saturating_sub(model.rate_of("calls_ok"));
    let mut second = format!("errors {not_ok}/s  overruns {}/s", model.rate_of("overruns"));
    if let Some(times) = model.times() {
        let at = |share| times.quantile_ns(share).map_or_else(String::new, time);
        second += &format!("  p50 {}  p90 {}  p99 {}  p99.9 {}", at(0.5), at(0.9), at(0.99), at(0.999));
    }
    for silent in &model.report.silent {
        second += &format!("  REACTOR {silent} DOES NOT ANSWER");
    }
    Paragraph::new(vec![Line::from(first).bold(), Line::from(second)])
}

/// A bar with its label over it.
fn bar(frame: &mut Frame<'_>, area: Rect, ratio: f64, label: String) {
    let gauge = Gauge::default().ratio(ratio.clamp(0.0, 1.0)).label(Span::from(label)).use_unicode(true);
    frame.render_widget(gauge.gauge_style(Style::new().add_modifier(Modifier::DIM)), area);
}

fn draw_memory(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let (used, budget) = (model.report.counter("budget_used"), model.report.memory_budget);
    let leased = bytes(model.report.counter("leased_bytes"));
    let label = format!("memory {} of {}, {leased} leased", bytes(used), bytes(budget));
    bar(frame, area, used as f64 / budget.max(1) as f64, label);
}

fn draw_reactors(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let rows = Layout::vertical(vec![Constraint::Length(1); area.height.into()]).split(area);
    for (i, percent) in model.busy_percent().into_iter().enumerate().take(2 * rows.len()) {
        let halves: [Rect; 2] = Layout::horizontal([Constraint::Fill(1); 2]).spacing(1).areas(rows[i / 2]);
        let only_one = model.report.reactors.len() == 1;
        let place = if only_one { rows[0] } else { halves[i % 2] };
        let hot = model.report.reactors[i].lanes_hot;
        bar(
            frame,
            place,
            percent as f64 / 100.0,
            format!("reactor {i}: {percent} % in calls, {hot} lanes hot"),
        );
    }
}

fn draw_histogram(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let histogram = model.histogram();
    let block = Block::bordered().title("time of calls, up to");
    let bars: Vec<Bar<'_>> = histogram
        .iter()
        .map(|(bound, calls)| {
            Bar::default().value(*calls).text_value(count(*calls)).label(Line::from(bound.as_str()))
        })
        .collect();
    let chart =
        BarChart::default().block(block).bar_width(6).bar_gap(1).data(BarGroup::default().bars(&bars));
    frame.render_widget(chart, area);
}

fn draw_list(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let lines = model.lines();
    let columns = model.tab.columns();
    let (sorted, ascending) = model.sorted_by();
    let head = columns.iter().enumerate().map(|(i, name)| match (i == sorted, ascending) {
        (false, _) => (*name).to_owned(),
        (true, true) => format!("{name}^"),
        (true, false) => format!("{name}v"),
    });
    let head: Vec<String> = head.collect();
    let width =
        |i: usize| lines.iter().map(|line| line.cells[i].0.len()).chain([head[i].len()]).max().unwrap_or(1);
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let row = |cells: Vec<&str>| {
        let cells = cells.into_iter().zip(&widths).enumerate().map(|(i, (cell, width))| match i {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        Row::new(cells.collect::<Vec<_>>())
    };
    let cells = |line: &'_ Entry| line.cells.iter().map(|(text, _)| text.clone()).collect::<Vec<_>>();
    let rows = lines.iter().map(|line| {
        let cells = cells(line);
        row(cells.iter().map(String::as_str).collect())
    });
    let tabs = Tab::ALL
        .map(|tab| if tab == model.tab { format!("[{}]", tab.name()) } else { format!(" {} ", tab.name()) });
    let block = Block::bordered().title(tabs.join(" ")).title_bottom(format!("{} lines", lines.len()));
    let table = Table::new(rows, widths.iter().map(|width| Constraint::Length(*width as u16)))
        .header(row(head.iter().map(String::as_str).collect()).bold())
        .row_highlight_style(Style::new().reversed())
        .column_spacing(2)
        .block(block);
    let mut state = TableState::default().with_selected((!lines.is_empty()).then_some(model.selected));
    frame.render_stateful_widget(table, area, &mut state);
}

fn foot(model: &Model) -> Line<'_> {
    if !model.message.is_empty() {
        return Line::from(model.message.as_str()).bold();
    }
    match model.mode {
        Mode::Filter => Line::from(format!("filter: {}_  (Enter: done, Esc: none)", model.filter)),
        _ if model.filter.is_empty() => {
            Line::from("?: keys  Tab: list  s: sort  /: filter  k: end session  q: leave")
        }
        _ => Line::from(format!("filter: {}  /: change  ?: keys  q: leave", model.filter)),
    }
}

fn popup(frame: &mut Frame<'_>, title: &str, text: &str) {
    let width = text.lines().map(str::len).max().unwrap_or(0) as u16 + 4;
    let height = text.lines().count() as u16 + 2;
    let [row] = Layout::vertical([Constraint::Length(height)]).flex(Flex::Center).areas(frame.area());
    let [area] = Layout::horizontal([Constraint::Length(width)]).flex(Flex::Center).areas(row);
    frame.render_widget(Clear, area);
    frame.render_widget(Paragraph::new(text).block(Block::bordered().title(title.to_owned())), area);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::watch::top::model::Asked;
    use doorbell::inspect::{ConnectionReport, EndSession, LaneReport, Report};
    use doorbell::{BUCKETS, ReactorMetrics, TypeMetrics};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

    /// A server with so many sessions, each with a connection, after so many seconds.
    fn report(sessions: u32, seconds: u64) -> Report {
        let mut buckets = [0; BUCKETS];
        (buckets[0], buckets[3]) = (900 * seconds, 100 * seconds);
        let lane = |session: u32| LaneReport {
            session,
            generation: 7,
            lane: 0,
            reactor: 0,
            pid: 1000 + session,
            hot: true,
            taken: u64::from(session + 1) * 100 * seconds,
            entries_waiting: 0,
            answers_waiting: 2,
            exchanges: 1,
            leased_bytes: 16384,
        };
        let connection = |session: u32| ConnectionReport {
            session,
            connection: 0x10_0000 | session,
            reactor: 0,
            bulk: false,
            requests: u64::from(session + 1) * 100 * seconds,
            bytes: 6400,
            time_ns: 30_000,
        };
        let counters = [
            ("sessions_open", sessions.into()),
            ("calls", 1000 * seconds),
            ("calls_ok", 1000 * seconds),
            ("budget_used", 2 << 20),
        ];
        Report {
            now_ns: seconds * 1_000_000_000,
            pid: 4711,
            counters: counters.map(|(name, value): (&str, u64)| (name.to_owned(), value)).into(),
            memory_budget: 3 << 20,
            types: vec![TypeMetrics { message_type: 2, sum_ns: 1_000_000, longest_ns: 2_000, buckets }],
            reactors: vec![ReactorMetrics { busy_ns: seconds * 420_000_000, ..ReactorMetrics::default() }; 2],
            sessions: (0..sessions).map(lane).collect(),
            connections: (0..sessions).map(connection).collect(),
            ..Report::default()
        }
    }

    fn model(sessions: u32) -> Model {
        let mut model = Model::new(report(sessions, 1));
        model.update(report(sessions, 2));
        model
    }

    fn press(model: &mut Model, keys: &str) -> Asked {
        let mut asked = Asked::Nothing;
        for key in keys.chars() {
            let code = match key {
                '\t' => KeyCode::Tab,
                '\n' => KeyCode::Enter,
                'v' => KeyCode::Down,
                other => KeyCode::Char(other),
            };
            asked = model.key(KeyEvent::new(code, KeyModifiers::NONE));
        }
        asked
    }

    fn picture(model: &Model, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, model)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>() + "\n";
        (0..height).map(line).collect()
    }

    /// Goal:   everything that has to be seen is seen on a small and on a large terminal, and nothing breaks on tiny ones.
    /// Method: all lists with two and with five hundred sessions, drawn on terminals of several sizes.
    #[test]
    fn everything_is_seen_on_small_and_large_terminals() {
        for (width, height) in [(80, 24), (200, 50)] {
            for sessions in [2, 500] {
                let mut model = model(sessions);
                let text = picture(&model, width, height);
                for part in [
                    "doorbell 4711",
                    "calls 1000/s",
                    "memory 2.00 MiB of 3.00 MiB",
                    "reactor 1: 42 %",
                    "[sessions]",
                    "250ns",
                    "leased",
                    "p99",
                ] {
                    assert!(text.contains(part), "{part} in\n{text}");
                }
                let first = format!(" {} ", 999 + sessions);
                assert!(text.contains(&first), "the busiest first:\n{text}");
                press(&mut model, "\t");
                assert!(
                    picture(&model, width, height).contains(&format!("{:#x}", 0x10_0000 | (sessions - 1)))
                );
                press(&mut model, "\t");
                assert!(picture(&model, width, height).contains("echo"));
                press(&mut model, "?");
                assert!(picture(&model, width, height).contains("choose a line"));
            }
        }
        for (width, height) in [(40, 10), (20, 5), (1, 1)] {
            picture(&model(3), width, height);
        }
    }

    /// Goal:   lists are sorted and filtered as the keys say, and the chosen line is one of them.
    #[test]
    fn lists_are_sorted_and_filtered() {
        let mut model = model(30);
        let first = |model: &Model| model.lines()[0].cells[0].0.clone();
        assert_eq!(first(&model), "29");
        press(&mut model, "r");
        assert_eq!(first(&model), "0");
        press(&mut model, "sssssr");
        assert_eq!((model.sorted_by(), first(&model).as_str()), ((0, false), "29"));
        press(&mut model, "vvvvvvvvvvv/1015\n");
        assert_eq!((model.lines().len(), model.selected, first(&model).as_str()), (1, 0, "15"));
        assert!(picture(&model, 80, 24).contains("filter: 1015"));
    }

    /// Goal:   a session is ended after a plain yes, and after nothing else.
    #[test]
    fn a_session_is_ended_after_a_question() {
        let mut model = model(3);
        assert_eq!(press(&mut model, "vk"), Asked::Nothing);
        let text = picture(&model, 80, 24);
        assert!(text.contains("End session 1?"), "{text}");
        assert_eq!(press(&mut model, "n"), Asked::Nothing);
        assert_eq!(press(&mut model, "y"), Asked::Nothing, "there was no question");
        assert_eq!(press(&mut model, "ky"), Asked::End(EndSession { session: 1, generation: 7 }));
        model.told(Ok(Some(true)));
        assert!(picture(&model, 80, 24).contains("the session is ended"));
        press(&mut model, "\t\t");
        assert_eq!(press(&mut model, "k"), Asked::Nothing);
        assert_eq!(press(&mut model, "y"), Asked::Nothing, "a type is no session");
        assert_eq!(press(&mut model, "q"), Asked::Quit);
    }
}
