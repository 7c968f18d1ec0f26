//! Asking a local API.
//!
//! Output: JSON, or an error that names the socket and what to do.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Method, Request, Response, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::UnixStream, time::timeout};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// How large an answer may be.
const LARGEST: usize = 256 << 20;

/// Asks for JSON.
///
/// # Errors
///
/// Nobody answers, the answer is an error, or it is not what was expected.
pub async fn get<T: DeserializeOwned>(socket: &Path, path: &str) -> anyhow::Result<T> {
    exchange(socket, Method::GET, path, Bytes::new()).await
}

/// Sends JSON and reads the answer's.
///
/// # Errors
///
/// As [`get`].
pub async fn post<T: DeserializeOwned>(socket: &Path, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
    exchange(socket, Method::POST, path, serde_json::to_vec(body)?.into()).await
}

async fn exchange<T: DeserializeOwned>(socket: &Path, method: Method, path: &str, body: Bytes) -> anyhow::Result<T> {
    let asked = async {
        let answer = send(socket, method, path, body).await?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), LARGEST)
            .collect()
            .await
            .map_err(|error| anyhow::anyhow!("{}: {error}", socket.display()))?
            .to_bytes();
        if !status.is_success() {
            let problem: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
            bail!("{status}: {}", problem["detail"].as_str().unwrap_or("no explanation"));
        }
        serde_json::from_slice(&body).with_context(|| format!("the answer of {} to {path}", socket.display()))
    };
    timeout(PATIENCE, asked)
        .await
        .with_context(|| format!("{} did not answer within {PATIENCE:?}", socket.display()))?
}

/// Sends a request; the body is read by the caller, for as long as it likes.
///
/// # Errors
///
/// Nobody answers.
pub async fn send(socket: &Path, method: Method, path: &str, body: Bytes) -> anyhow::Result<Response<Incoming>> {
    let stream = UnixStream::connect(socket).await.with_context(|| {
        format!(
            "nobody answers on {}; is it running, and is this its socket?",
            socket.display()
        )
    })?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "localhost")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(body))?;
    Ok(sender.send_request(request).await?)
}
