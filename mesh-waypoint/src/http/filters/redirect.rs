//! `RequestRedirect`: the client is sent elsewhere, and no application hears of it.

use http::{HeaderValue, Response, StatusCode, header};

use crate::{
    record::Record,
    view::{Redirected, Unroutable},
};

/// The head of the answer, told to `record`.
///
/// # Errors
/// [`Unroutable::NoBackend`] when the location would not be one.
pub fn answer(to: &Redirected, record: &mut Record) -> Result<Response<()>, Unroutable> {
    let location = HeaderValue::try_from(to.location.as_str());
    let status = StatusCode::from_u16(to.status);
    let (Ok(location), Ok(status)) = (location, status) else {
        return Err(Unroutable::NoBackend("the redirect has no valid location".into()));
    };
    let mut response = Response::new(());
    *response.status_mut() = status;
    response.headers_mut().insert(header::LOCATION, location);
    for filters in to.routed.filters() {
        filters.response.apply(response.headers_mut());
    }
    record.details = "direct_response";
    record.answered(status, response.headers());
    Ok(response)
}
