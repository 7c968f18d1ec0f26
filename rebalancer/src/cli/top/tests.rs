use ratatui::{Terminal, backend::TestBackend};
use serde_json::json;

use super::{
    draw::draw,
    model::{Answers, HISTORY, Key, List, Model},
};

pub fn answers(loads: [u64; 3]) -> Answers {
    let mean = loads.iter().sum::<u64>() as f64 / 3.0;
    let entry = |index: usize| {
        json!({"apiserver": format!("cp-{}", index + 1), "state": if loads[index] == 0 { "starting" } else { "ready" },
            "connections": loads[index], "load": loads[index], "draining": index})
    };
    let connection = |index: usize| {
        json!({"connection": format!("{index:016x}"), "client": format!("192.0.2.{index}:4711"), "protocol": "h2",
            "state": "active", "node_local": false, "age_s": 100 - index, "requests": index, "open_streams": 1,
            "open_watches": 1, "user": format!("user-{index}"), "user_agent": "kubelet\u{1b}[2J"})
    };
    let decision = |id: u64| {
        json!({"id": id, "at": "2026-01-01T00:00:00Z", "mode": "active", "skew": 0.1, "victims": [],
            "hold": {"reason": "noise", "message": format!("hold number {id}")},
            "outcomes": {"pending": 0, "draining": 0, "moved": 0, "returned": 0, "lost": 0}})
    };
    Answers {
        status: json!({"node": "cp-1", "mode": "active", "paused": false, "source": "ebpf", "shim": "relay",
            "skew": 0.5, "trigger": 0.1, "skew_target": 0.03, "goaways_total": 7, "mean": mean,
            "hold": {"reason": "noise", "message": "the skew of 5.0 % is what chance makes"}, "hold_since_s": 75,
            "view": [entry(0), entry(1), entry(2)]}),
        connections: json!({"connections": (0..40).map(connection).collect::<Vec<_>>(), "total": 40}),
        decisions: json!({"decisions": (1..=30).map(decision).collect::<Vec<_>>()}),
    }
}

fn model(loads: [u64; 3]) -> Model {
    let mut model = Model::new(false);
    model.take(Ok(answers(loads)));
    model
}

/// The screen as lines, without blanks at their ends.
fn screen(model: &Model, width: u16, height: u16) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
    terminal.draw(|frame| draw(model, frame)).expect("a screen");
    let buffer = terminal.backend().buffer();
    (0..height)
        .map(|y| {
            let line: String = (0..width).map(|x| buffer[(x, y)].symbol()).collect();
            line.trim_end().to_owned()
        })
        .collect()
}

#[test]
fn a_small_screen_without_colours_shows_it_all() {
    let screen = screen(&model([150, 100, 50]), 80, 24);
    assert_eq!(screen[0], "cp-1 · active · source ebpf · shim relay");
    assert_eq!(
        screen[1],
        "skew +50.0 % (starts above +10.0 %, stops at +3.0 %) · 7 GOAWAYs sent"
    );
    assert_eq!(screen[2], "hold for 1m15s: the skew of 5.0 % is what chance makes");
    // 40 columns of bar for at most 150: the mean is at 27, the band from 24 to 29.
    let (full, tenth) = ("█".repeat(24), " ".repeat(10));
    assert_eq!(
        screen[4],
        format!("cp-1            {full}┊██│█┊██████████    150   +50.0 %")
    );
    assert_eq!(
        screen[5],
        format!("cp-2            {full}┊██│ ┊{tenth}    100    +0.0 % -1")
    );
    let half = "█".repeat(13) + &" ".repeat(11);
    assert_eq!(
        screen[6],
        format!("cp-3            {half}┊  │ ┊{tenth}     50   -50.0 % -2")
    );
    assert_eq!(screen[8], "CONNECTIONS, by age: 40 of 40");
    assert!(screen[9].contains("192.0.2.0:4711"), "{screen:#?}");
    assert!(screen[23].starts_with("q quit"), "{screen:#?}");
    assert!(screen.iter().all(|line| !line.contains('\u{1b}')));
}

#[test]
fn a_wide_screen_has_the_last_minutes_too() {
    let mut model = model([150, 100, 0]);
    for load in 0..(HISTORY as u64 * 2) {
        model.take(Ok(answers([load, 100, 0])));
    }
    assert!(model.history.values().all(|past| past.len() == HISTORY));
    let screen = screen(&model, 120, 30);
    assert!(screen[4].ends_with(|c| "▁▂▃▄▅▆▇█".contains(c)), "{}", screen[4]);
    assert!(screen[6].contains("starting"), "{}", screen[6]);
}

/// A screen as an SVG: each run of cells of one style is a text of just its width.
fn picture(model: &Model, width: u16, height: u16) -> String {
    use std::fmt::Write as _;

    use ratatui::style::{Color, Modifier};
    const CELL: u16 = 8;
    const LINE: u16 = 18;
    let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
    terminal.draw(|frame| draw(model, frame)).expect("a screen");
    let buffer = terminal.backend().buffer();
    let (wide, high) = (width * CELL + 16, height * LINE + 16);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {wide} {high}\" font-family=\"monospace\" font-size=\"13\" \
         role=\"img\" aria-label=\"rebalancer top\">\n<rect width=\"{wide}\" height=\"{high}\" rx=\"6\" fill=\"#16181d\"/>\n"
    );
    let style = |x: u16, y: u16| {
        let cell = &buffer[(x, y)];
        let fill = match cell.fg {
            Color::Red => "#f07178",
            Color::Green => "#8bd49c",
            Color::Yellow => "#ebbf83",
            Color::Cyan | Color::Blue => "#70c0e8",
            Color::DarkGray => "#7f8694",
            _ => "#d8dee9",
        };
        (fill, cell.modifier)
    };
    for y in 0..height {
        let mut x = 0;
        while x < width {
            let from = x;
            let (fill, modifier) = style(x, y);
            let mut text = String::new();
            while x < width && style(x, y) == (fill, modifier) {
                text += buffer[(x, y)].symbol();
                x += 1;
            }
            let (left, top) = (8 + from * CELL, 8 + y * LINE);
            let is_reversed = modifier.contains(Modifier::REVERSED);
            if is_reversed {
                let _ = writeln!(
                    svg,
                    "<rect x=\"{left}\" y=\"{top}\" width=\"{}\" height=\"{LINE}\" fill=\"{fill}\"/>",
                    (x - from) * CELL
                );
            }
            if text.trim().is_empty() {
                continue;
            }
            let text = text.replace('&', "&amp;").replace('<', "&lt;");
            let weight = if modifier.contains(Modifier::BOLD) {
                " font-weight=\"bold\""
            } else {
                ""
            };
            let _ = writeln!(
                svg,
                "<text x=\"{left}\" y=\"{}\" textLength=\"{}\" fill=\"{}\"{weight} xml:space=\"preserve\">{text}</text>",
                top + 13,
                (x - from) * CELL,
                if is_reversed { "#16181d" } else { fill },
            );
        }
    }
    svg + "</svg>\n"
}

#[test]
fn the_picture_in_the_docs_is_this_screen() {
    let mut model = Model::new(true);
    // An apiserver comes back empty, and gets its share.
    for step in 0..HISTORY as u64 {
        let back = (step * 2).saturating_sub(HISTORY as u64).min(100);
        let mut answers = answers([150 - back / 2, 150 - back / 2, back]);
        answers.status["skew"] = json!(0.0);
        answers.status["hold"]["message"] = json!("skew +0.0 % is within 10.0 %");
        model.take(Ok(answers));
    }
    crate::reference::file("docs/top.svg", &picture(&model, 110, 26));
}

#[test]
fn no_size_of_a_terminal_is_too_small_to_draw_on() {
    let model = model([150, 100, 50]);
    for (width, height) in [(1, 1), (10, 3), (200, 5), (20, 60), (80, 8)] {
        screen(&model, width, height);
    }
    screen(&Model::new(true), 80, 24);
}

#[test]
fn keys_choose_what_is_listed() {
    let mut model = model([150, 100, 50]);
    assert_eq!((model.list, model.sort()), (List::Connections, "age"));
    assert!(model.press(Key::Char('s')));
    assert_eq!(model.sort(), "requests");
    for key in ['/', 'U', 's', 'e', 'r', '-', '3', '9'].map(Key::Char) {
        assert!(model.press(key));
    }
    assert_eq!(model.lines().len(), 1);
    assert!(screen(&model, 80, 24)[23].starts_with("/User-39_"));
    // A letter that is a command elsewhere is a letter here.
    assert!(model.press(Key::Char('q')));
    assert_eq!(model.lines().len(), 0);
    assert!(model.press(Key::Backspace) && model.press(Key::Enter));
    assert!(screen(&model, 80, 24)[8].contains("with `User-39`: 1 of 40"));
    assert!(model.press(Key::Escape));
    assert_eq!(model.lines().len(), 40);
    assert!(model.press(Key::Down(100)) && model.press(Key::Down(1)));
    assert_eq!(model.first, 39);
    assert!(model.press(Key::Tab));
    assert_eq!((model.list, model.first), (List::Decisions, 0));
    assert!(model.lines()[0].contains("hold number 30"), "the newest first");
    assert!(!model.press(Key::Char('q')));
}

#[test]
fn an_agent_that_is_gone_leaves_its_last_figures_and_says_so() {
    let mut model = model([150, 100, 50]);
    model.take(Err("nobody answers on /run/rebalancer/agent.sock".to_owned()));
    let screen = screen(&model, 80, 24);
    assert!(
        screen[2].starts_with("these are old figures: nobody answers"),
        "{}",
        screen[2]
    );
    assert!(screen[4].contains("150"));
}
