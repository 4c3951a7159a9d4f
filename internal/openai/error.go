package openai

import (
	"fmt"
	"net/http"
	"strconv"
)

// Values of [Error.Type].
const (
	TypeInvalidRequest = "invalid_request_error"
	TypeServer         = "server_error"
)

// CodeContextLength is the [Error.Code] of a prompt that is longer, with the
// tokens that are asked for, than the model's context. Clients know it.
const CodeContextLength = "context_length_exceeded"

// Error is an answer that is not a result: a status code and OpenAI's error
// object. It never holds text of a prompt.
type Error struct {
	Status  int    // HTTP status code
	Type    string // class of error; [TypeInvalidRequest] and so on
	Code    string // for programs, "" for none
	Param   string // the parameter that is wrong, "" for none
	Message string // for people
}

func (e *Error) Error() string { return e.Message }

// Body returns the JSON text of the answer, {"error":{…}}. In a stream that has
// begun it is the data of an event.
func (e *Error) Body() []byte {
	b := quote([]byte(`{"error":{"message":`), e.Message)
	b = quote(append(b, `,"type":`...), e.Type)
	b = orNull(append(b, `,"param":`...), e.Param)
	b = orNull(append(b, `,"code":`...), e.Code)
	return append(b, "}}"...)
}

func orNull(dst []byte, s string) []byte {
	if s == "" {
		return append(dst, "null"...)
	}
	return quote(dst, s)
}

// WriteError answers with e.
func WriteError(w http.ResponseWriter, e *Error) {
	body := e.Body()
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(e.Status)
	_, _ = w.Write(body) // a client that has gone needs no answer
}

// ModelNotFound is the answer to a request for a model that is not served.
func ModelNotFound(model string) *Error {
	return &Error{
		Status: http.StatusNotFound, Type: TypeInvalidRequest, Code: "model_not_found", Param: "model",
		Message: fmt.Sprintf("The model %.80q does not exist.", model),
	}
}

func invalid(code, param, format string, args ...any) *Error {
	return &Error{
		Status: http.StatusBadRequest, Type: TypeInvalidRequest, Code: code, Param: param,
		Message: fmt.Sprintf(format, args...),
	}
}

func wrongType(param, want string, got []byte) *Error {
	return invalid("invalid_type", param, "Invalid type for '%s': expected %s, but got %s instead.", param, want, typeName(got))
}

func wrongValue(param, format string, args ...any) *Error {
	return invalid("invalid_value", param, "Invalid value for '%s': %s.", param, fmt.Sprintf(format, args...))
}

func missing(param string) *Error {
	return invalid("missing_required_parameter", param, "Missing required parameter: '%s'.", param)
}

func unsupported(param string) *Error {
	return invalid("unsupported_parameter", param, "Unsupported parameter: '%s' is not supported by this network.", param)
}

func unknown(param string) *Error {
	return invalid("unknown_parameter", param, "Unknown parameter: '%s'.", param)
}
