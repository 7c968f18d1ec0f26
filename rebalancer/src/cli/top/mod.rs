//! `rebalancer top`: the cluster as this agent sees it, live on a terminal or in a browser.
//!
//! Input: the agent's local API, once a second, and keys. Must never change anything, nor leave a terminal as it is not.

mod draw;
mod model;
#[cfg(test)]
mod tests;
mod web;

use std::{
    io::{self, IsTerminal as _},
    path::Path,
    thread,
    time::Duration,
};

use anyhow::Context as _;
use clap::Args;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use serde_json::Value;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};

use self::model::Key;
pub use self::{
    draw::bars,
    model::{Answers, Model},
};
use super::{Failure, client::Api, runtime};
use crate::local::client;

/// Show the cluster live: load against the band, connections, decisions as they happen; keys are in the last line
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    api: Api,
    /// Without colours, as with NO_COLOR in the environment
    #[arg(long)]
    no_color: bool,
    /// Serve a page for browsers that shows the same, instead of using the terminal: a port of 127.0.0.1, or ADDRESS:PORT
    /// (anybody who reaches it may look)
    #[arg(long, value_name = "ADDRESS")]
    web: Option<web::Address>,
    /// With --web: show addresses and users of clients, too
    #[arg(long, requires = "web")]
    names: bool,
}

/// How often the agent is asked.
const LOOK: Duration = Duration::from_secs(1);

/// Connections that are asked for: what a screen can hold, and some for the filter.
const CONNECTIONS: usize = 500;

/// Decisions that are asked for.
const DECISIONS: usize = 100;

/// Runs until it is told to end, by a key or a signal.
pub fn run(arguments: &Arguments) -> Result<(), Failure> {
    if let Some(web::Address(address)) = arguments.web {
        let served = web::run(arguments.api.path(), address, arguments.names);
        return Ok(runtime()?.block_on(served)?);
    }
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return Err(Failure::Configuration(anyhow::anyhow!(
            "top needs a terminal; `rebalancer status` shows the same once, `rebalancer top --web 9472` to browsers"
        )));
    }
    let is_plain = arguments.no_color || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let runtime = runtime()?;
    // A first answer before the screen is taken: an error stays readable.
    let first = runtime.block_on(ask(arguments.api.path(), "age"))?;
    let mut model = Model::new(!is_plain);
    model.take(Ok(first));
    let mut terminal = ratatui::try_init().context("the terminal cannot be used")?;
    let outcome = runtime.block_on(show(&mut terminal, &mut model, arguments.api.path()));
    ratatui::restore();
    Ok(outcome?)
}

/// Shows, asks, and obeys keys.
async fn show(terminal: &mut ratatui::DefaultTerminal, model: &mut Model, socket: &Path) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (sender, mut keys) = mpsc::channel(16);
    // It ends with the process: a read from a terminal cannot be given up.
    thread::Builder::new().name("keys".to_owned()).spawn(move || {
        while let Ok(event) = event::read() {
            if sender.blocking_send(event).is_err() {
                return;
            }
        }
    })?;
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        terminal.draw(|frame| draw::draw(model, frame))?;
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = hang_up.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = ticks.tick() => {
                let answer = ask(socket, model.sort()).await;
                model.take(answer.map_err(|error| format!("{error:#}")));
            }
            event = keys.recv() => match event {
                None => return Ok(()),
                Some(event) => if let Some(key) = key(&event) && !model.press(key) {
                    return Ok(());
                }
            },
        }
    }
}

/// A key as the model knows it; a terminal of another size is drawn anew without one.
fn key(event: &Event) -> Option<Key> {
    let Event::Key(pressed) = event else { return None };
    if pressed.kind == KeyEventKind::Release {
        return None;
    }
    if pressed.modifiers.contains(KeyModifiers::CONTROL) {
        return (pressed.code == KeyCode::Char('c')).then_some(Key::Quit);
    }
    Some(match pressed.code {
        KeyCode::Char(c) => Key::Char(c),
        KeyCode::Backspace => Key::Backspace,
        KeyCode::Enter => Key::Enter,
        KeyCode::Esc => Key::Escape,
        KeyCode::Tab => Key::Tab,
        KeyCode::Up => Key::Up(1),
        KeyCode::Down => Key::Down(1),
        KeyCode::PageUp => Key::Up(10),
        KeyCode::PageDown => Key::Down(10),
        _ => return None,
    })
}

/// All that is shown.
async fn ask(socket: &Path, sort: &str) -> anyhow::Result<Answers> {
    let status: Value = client::get(socket, "/v1/status").await?;
    let connections: Value = client::get(socket, &format!("/v1/connections?sort={sort}&limit={CONNECTIONS}")).await?;
    let decisions: Value = client::get(socket, &format!("/v1/decisions?limit={DECISIONS}")).await?;
    Ok(Answers {
        status,
        connections,
        decisions,
    })
}
