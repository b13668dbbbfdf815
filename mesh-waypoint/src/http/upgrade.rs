//! After `101 Switching Protocols`: bytes both ways until both sides are done.

use http::{HeaderValue, Response, StatusCode, header};
use hyper::{body::Incoming, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;

use super::{Downstream, body::ResponseBody, headers, wire::Judge};
use crate::{
    record::{Flag, Record},
    tcp::carry,
};

/// Answers 101 and carries the bytes in a task of its own; the record closes when they end.
pub fn switch(
    cx: &Downstream,
    mut response: Response<Incoming>,
    downstream: OnUpgrade,
    mut record: Record,
    judge: &Judge,
) -> Response<ResponseBody> {
    record.status = Some(StatusCode::SWITCHING_PROTOCOLS);
    let upstream = hyper::upgrade::on(&mut response);
    let protocol = response.headers().get(header::UPGRADE).cloned();
    headers::strip_hop_by_hop(response.headers_mut());
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    if let Some(protocol) = protocol {
        response.headers_mut().insert(header::UPGRADE, protocol);
    }
    // The client's next bytes are no request any more.
    judge.upgraded();
    let draining = cx.waypoint.draining.clone();
    cx.waypoint.tasks.spawn(async move {
        let (client, application) = match tokio::try_join!(downstream, upstream) {
            Ok(both) => both,
            Err(error) => {
                record.fail(Flag::UC, "upgrade_failed", error);
                return record.close();
            }
        };
        let counters = record.counters.clone();
        let carried = carry(TokioIo::new(client), TokioIo::new(application), &counters, &draining).await;
        if let Err(error) = carried {
            record.fail(Flag::UC, "upgraded_stream_failed", error);
        }
        record.close();
    });
    let (mut parts, _no_body) = response.into_parts();
    parts.extensions.clear();
    Response::from_parts(parts, ResponseBody::switching())
}
