//! What `doorbell top` shows, and what its keys mean. Knows no terminal.

use super::super::stat::since;
use super::super::words::{bytes, count, time};
use doorbell::inspect::{EndSession, Report, type_name};
use doorbell::{BOUNDS_NS, TypeMetrics};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use std::cmp::Reverse;

/// What is listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tab {
    Sessions,
    Connections,
    Types,
}

impl Tab {
    pub const ALL: [Self; 3] = [Self::Sessions, Self::Connections, Self::Types];

    pub fn name(self) -> &'static str {
        match self {
            Self::Sessions => "sessions",
            Self::Connections => "connections",
            Self::Types => "message types",
        }
    }

    /// Names of its columns. The first stands left, the others right.
    pub fn columns(self) -> &'static [&'static str] {
        match self {
            Self::Sessions => {
                &["session", "pid", "lanes", "conns", "calls/s", "calls", "long", "waiting", "leased"]
            }
            Self::Connections => &["connection", "session", "calls/s", "calls", "bytes/s", "bytes", "mean"],
            Self::Types => &["type", "calls/s", "calls", "mean", "p50", "p99", "p99.9", "longest"],
        }
    }
}

/// A line of the list: its cells, and for each the number that it is sorted by.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    pub cells: Vec<(String, u64)>,
    /// The session that it is about, and its generation.
    pub session: Option<(u32, u32)>,
}

/// What a key asks for beyond another picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    Nothing,
    Quit,
    End(EndSession),
}

/// What the keyboard is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    List,
    Filter,
    Confirm(EndSession),
    Help,
}

#[derive(Debug)]
pub struct Model {
    pub report: Report,
    before: Option<Report>,
    pub tab: Tab,
    /// The column that is sorted by, of each tab, and whether the smallest comes first.
    sort: [(usize, bool); 3],
    pub filter: String,
    pub mode: Mode,
    pub selected: usize,
    pub message: String,
}

impl Model {
    pub fn new(report: Report) -> Self {
        Self {
            report,
            before: None,
            tab: Tab::Sessions,
            sort: [(4, false), (2, false), (1, false)],
            filter: String::new(),
            mode: Mode::List,
            selected: 0,
            message: String::new(),
        }
    }

    /// Something newer has come.
    pub fn update(&mut self, report: Report) {
        self.before = Some(std::mem::replace(&mut self.report, report));
        self.selected = self.selected.min(self.lines().len().saturating_sub(1));
    }

    /// What has become of a session that was to end.
    pub fn told(&mut self, result: Result<Option<bool>, String>) {
        self.message = match result {
            Ok(Some(false)) => "the session had ended before".to_owned(),
            Ok(_) => "the session is ended".to_owned(),
            Err(error) => error,
        };
    }

    /// Per second since the last report.
    fn rate(&self, now: u64, then: Option<u64>) -> u64 {
        let Some(before) = &self.before else { return 0 };
        let elapsed = self.report.now_ns.saturating_sub(before.now_ns).max(1);
        (now.saturating_sub(then.unwrap_or(0)) as f64 * 1e9 / elapsed as f64).round() as u64
    }

    /// The rate of a counter.
    pub fn rate_of(&self, name: &str) -> u64 {
        self.rate(self.report.counter(name), self.before.as_ref().map(|before| before.counter(name)))
    }

    /// How much of its time each reactor spends in calls, percent.
    pub fn busy_percent(&self) -> Vec<u64> {
        let Some(before) = &self.before else { return vec![0; self.report.reactors.len()] };
        let elapsed = self.report.now_ns.saturating_sub(before.now_ns).max(1);
        let then = |i: usize| before.reactors.get(i).map_or(0, |reactor| reactor.busy_ns);
        let busy = |(i, now): (usize, &doorbell::ReactorMetrics)| now.busy_ns.saturating_sub(then(i));
        self.report.reactors.iter().enumerate().map(|all| (busy(all) * 100 / elapsed).min(100)).collect()
    }

    /// Times of all calls since the last report, or of all of them before there are two.
    pub fn times(&self) -> Option<TypeMetrics> {
        let mut sum: Option<TypeMetrics> = None;
        for of in &self.report.types {
            let of = since(of, self.before.as_ref());
            match &mut sum {
                Some(sum) => sum.add(&of),
                None => sum = Some(of),
            }
        }
        sum.filter(|sum| sum.calls() > 0)
    }

    /// The histogram, from the first bucket that has a call to the last: the upper bound and the calls of each.
    pub fn histogram(&self) -> Vec<(String, u64)> {
        let Some(times) = self.times() else { return Vec::new() };
        let first = times.buckets.iter().position(|calls| *calls > 0).unwrap_or(0);
        let last = times.buckets.iter().rposition(|calls| *calls > 0).unwrap_or(0);
        let bound = |i: usize| match BOUNDS_NS.get(i) {
            Some(ns) => time(*ns).replace(".00", "").replace(".0", "").replace(' ', ""),
            None => "more".to_owned(),
        };
        (first..=last).map(|i| (bound(i), times.buckets[i])).collect()
    }

    pub fn sorted_by(&self) -> (usize, bool) {
        self.sort[self.tab as usize]
    }

    /// The list, filtered and sorted.
    pub fn lines(&self) -> Vec<Line> {
        let mut lines = match self.tab {
            Tab::Sessions => self.sessions(),
            Tab::Connections => self.connections(),
            Tab::Types => self.types(),
        };
        lines.retain(|line| line.cells.iter().any(|(text, _)| text.contains(&self.filter)));
        let (column, ascending) = self.sorted_by();
        match ascending {
            true => lines.sort_by_key(|line| line.cells[column].1),
            false => lines.sort_by_key(|line| Reverse(line.cells[column].1)),
        }
        lines
    }

    fn sessions(&self) -> Vec<Line> {
        let lanes = &self.report.sessions;
        let homes = lanes.iter().filter(|lane| lane.lane == 0);
        homes
            .map(|home| {
                let is_its = |lane: &&doorbell::inspect::LaneReport| {
                    (lane.session, lane.generation) == (home.session, home.generation)
                };
                let its: Vec<_> = lanes.iter().filter(is_its).collect();
                let sum =
                    |of: fn(&doorbell::inspect::LaneReport) -> u64| its.iter().map(|l| of(l)).sum::<u64>();
                let before = self
                    .before
                    .as_ref()
                    .map(|before| before.sessions.iter().filter(is_its).map(|lane| lane.taken).sum::<u64>());
                let mut connections: Vec<u32> = self
                    .report
                    .connections
                    .iter()
                    .filter(|of| of.session == home.session)
                    .map(|of| of.connection)
                    .collect();
                connections.sort_unstable();
                connections.dedup();
                let (taken, leased) = (sum(|lane| lane.taken), sum(|lane| lane.leased_bytes));
                let rate = self.rate(taken, before);
                Line {
                    cells: vec![
                        number(home.session.into()),
                        number(home.pid.into()),
                        number(its.len() as u64),
                        number(connections.len() as u64),
                        (count(rate), rate),
                        (count(taken), taken),
                        number(sum(|lane| lane.exchanges)),
                        number(sum(|lane| lane.entries_waiting + lane.answers_waiting)),
                        (bytes(leased), leased),
                    ],
                    session: Some((home.session, home.generation)),
                }
            })
            .collect()
    }

    fn connections(&self) -> Vec<Line> {
        /// A connection is told of by each reactor that has served it.
        fn sums(report: &Report, connection: u32) -> (u64, u64, u64) {
            let its = report.connections.iter().filter(|of| of.connection == connection);
            its.fold((0, 0, 0), |(r, b, t), of| (r + of.requests, b + of.bytes, t + of.time_ns))
        }
        let mut all: Vec<(u32, u32)> =
            self.report.connections.iter().map(|of| (of.connection, of.session)).collect();
        all.sort_unstable();
        all.dedup();
        all.into_iter()
            .map(|(connection, session)| {
                let (calls, size, ns) = sums(&self.report, connection);
                let then = self.before.as_ref().map(|before| sums(before, connection));
                let rate = self.rate(calls, then.map(|then| then.0));
                let flow = self.rate(size, then.map(|then| then.1));
                let mean = ns / calls.max(1);
                let generation =
                    self.report.sessions.iter().find(|lane| lane.session == session && lane.lane == 0);
                Line {
                    cells: vec![
                        (format!("{connection:#x}"), connection.into()),
                        number(session.into()),
                        (count(rate), rate),
                        (count(calls), calls),
                        (bytes(flow), flow),
                        (bytes(size), size),
                        (time(mean), mean),
                    ],
                    session: generation.map(|lane| (session, lane.generation)),
                }
            })
            .collect()
    }

    fn types(&self) -> Vec<Line> {
        let line = |all: &TypeMetrics| {
            let recent = since(all, self.before.as_ref());
            let of = if recent.calls() > 0 { &recent } else { all };
            let rate = if self.before.is_some() { self.rate(recent.calls(), None) } else { 0 };
            let at = |share| {
                let ns = of.quantile_ns(share).unwrap_or(0);
                (time(ns), ns)
            };
            let mean = of.sum_ns / of.calls().max(1);
            Line {
                cells: vec![
                    (type_name(all.message_type), all.message_type.into()),
                    (count(rate), rate),
                    (count(all.calls()), all.calls()),
                    (time(mean), mean),
                    at(0.5),
                    at(0.99),
                    at(0.999),
                    (time(all.longest_ns), all.longest_ns),
                ],
                session: None,
            }
        };
        self.report.types.iter().map(line).collect()
    }

    /// What a key does.
    pub fn key(&mut self, key: KeyEvent) -> Asked {
        if key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL) {
            return Asked::Quit;
        }
        self.message.clear();
        match self.mode {
            Mode::List => return self.key_in_list(key.code),
            Mode::Filter => match key.code {
                KeyCode::Enter => self.mode = Mode::List,
                KeyCode::Esc => {
                    self.filter.clear();
                    self.mode = Mode::List;
                }
                KeyCode::Backspace => drop(self.filter.pop()),
                KeyCode::Char(c) if self.filter.len() < 32 => self.filter.push(c),
                _ => {}
            },
            // Nothing but a plain yes ends a session.
            Mode::Confirm(whom) => {
                self.mode = Mode::List;
                if key.code == KeyCode::Char('y') {
                    return Asked::End(whom);
                }
            }
            Mode::Help => self.mode = Mode::List,
        }
        self.selected = self.selected.min(self.lines().len().saturating_sub(1));
        Asked::Nothing
    }

    fn key_in_list(&mut self, code: KeyCode) -> Asked {
        let lines = self.lines();
        let last = lines.len().saturating_sub(1);
        match code {
            KeyCode::Char('q') | KeyCode::Esc => return Asked::Quit,
            KeyCode::Char('?') => self.mode = Mode::Help,
            KeyCode::Tab | KeyCode::BackTab => {
                let by = if code == KeyCode::Tab { 1 } else { Tab::ALL.len() - 1 };
                self.tab = Tab::ALL[(self.tab as usize + by) % Tab::ALL.len()];
                self.selected = 0;
            }
            KeyCode::Down | KeyCode::Char('j') => self.selected = (self.selected + 1).min(last),
            KeyCode::Up => self.selected = self.selected.saturating_sub(1),
            KeyCode::PageDown => self.selected = (self.selected + 10).min(last),
            KeyCode::PageUp => self.selected = self.selected.saturating_sub(10),
            KeyCode::Home => self.selected = 0,
            KeyCode::End => self.selected = last,
            KeyCode::Char('s') => {
                let sort = &mut self.sort[self.tab as usize];
                sort.0 = (sort.0 + 1) % self.tab.columns().len();
            }
            KeyCode::Char('r') => {
                let sort = &mut self.sort[self.tab as usize];
                sort.1 = !sort.1;
            }
            KeyCode::Char('/') => self.mode = Mode::Filter,
            KeyCode::Char('k') => match lines.get(self.selected).and_then(|line| line.session) {
                Some((session, generation)) => self.mode = Mode::Confirm(EndSession { session, generation }),
                None => self.message = "choose a session, or a connection of one".to_owned(),
            },
            _ => {}
        }
        Asked::Nothing
    }
}

fn number(number: u64) -> (String, u64) {
    (number.to_string(), number)
}
