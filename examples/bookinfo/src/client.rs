//! A client for the pods of the example: GET with headers, once or many times, each over a connection of its own.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use clap::Args;
use http::{HeaderName, HeaderValue, Request, Response, Uri};
use http_body_util::Full;

use crate::{settings::Target, web};

/// Fetches a URL.
#[derive(Args, Debug)]
pub struct Get {
    /// `http://host[:port]/path`
    url: Uri,
    /// A request header, as `name: value`; may be repeated.
    #[arg(short = 'H', long = "header", value_parser = header)]
    headers: Vec<(HeaderName, HeaderValue)>,
    /// Seconds for each request.
    #[arg(short = 'm', long, default_value_t = 20.0)]
    max_time: f64,
    /// Requests, one after the other. With more than one, each answer takes one line: its status and its body.
    #[arg(short = 'n', long, default_value_t = 1)]
    count: u32,
    /// Seconds between the end of a request and the next.
    #[arg(long, default_value_t = 0.0)]
    pause: f64,
}

fn header(text: &str) -> anyhow::Result<(HeaderName, HeaderValue)> {
    let (name, value) = text.split_once(':').context("a header is `name: value`")?;
    Ok((name.trim().parse()?, value.trim().parse()?))
}

impl Get {
    /// Runs the requests and prints the answers.
    ///
    /// # Errors
    /// For a single request, when there is no answer or its status is 400 or more.
    pub async fn run(&self) -> anyhow::Result<()> {
        if self.count == 1 {
            let answer = self.once().await?;
            println!("{}", String::from_utf8_lossy(answer.body()));
            ensure!(answer.status().as_u16() < 400, "{}", answer.status());
            return Ok(());
        }
        let pause = Duration::try_from_secs_f64(self.pause).context("--pause")?;
        for number in 0..self.count {
            if number > 0 {
                tokio::time::sleep(pause).await;
            }
            match self.once().await {
                Ok(answer) => {
                    let body = String::from_utf8_lossy(answer.body()).replace('\n', " ");
                    println!("{} {body}", answer.status().as_u16());
                }
                Err(error) => println!("000 {error:#}"),
            }
        }
        Ok(())
    }

    async fn once(&self) -> anyhow::Result<Response<Bytes>> {
        ensure!(self.url.scheme_str() == Some("http"), "{}: only http:// is spoken here", self.url);
        let host = self.url.host().context("the URL has no host")?;
        let port = self.url.port_u16().unwrap_or(80);
        let to = Target { host: host.trim_matches(['[', ']']).to_owned(), port };
        let mut request = Request::new(Full::default());
        let path = self.url.path_and_query().map_or("/", |path| path.as_str());
        *request.uri_mut() = path.parse()?;
        for (name, value) in &self.headers {
            request.headers_mut().append(name, value.clone());
        }
        let within = Duration::try_from_secs_f64(self.max_time).context("--max-time")?;
        web::call(&to, request, within).await.context("GET")
    }
}
