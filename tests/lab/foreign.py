"""Pages that are not the CA's: IIS's, http.sys's, a proxy's, a portal's (facts 2.4). None has an element ID of the CA's pages."""

from __future__ import annotations

from typing import Mapping, Tuple, Union

# title of a status, the sentence below it
_IIS: Mapping[str, Tuple[str, str]] = {
    "400": ("Bad Request", "Bad Request."),
    "401": ("Unauthorized", "Unauthorized: Access is denied due to invalid credentials."),
    "403": ("Forbidden", "Forbidden: Access is denied."),
    "403.4": ("Forbidden", "Forbidden: SSL is required to view this resource."),
    "403.6": ("Forbidden", "Forbidden: The IP address from which you are browsing has been rejected."),
    "403.7": ("Forbidden", "Forbidden: SSL client certificate is required."),
    "403.13": ("Forbidden", "Forbidden: The client certificate has been revoked."),
    "403.16": ("Forbidden", "Forbidden: The client certificate is untrusted or invalid."),
    "403.17": ("Forbidden", "Forbidden: The client certificate has expired or is not yet valid."),
    "404": ("Not Found", "File or directory not found."),
    "405": ("Method Not Allowed", "HTTP verb used to access this page is not allowed."),
    "408": ("Request Timeout", "The client did not send the request in time."),
    "413": ("Request Entity Too Large", "The page was not displayed because the request entity is too large."),
    "500": ("Internal Server Error", "Internal server error."),
    "502": ("Bad Gateway", "Web server received an invalid response while acting as a gateway or proxy server."),
    "504": ("Gateway Timeout", "Gateway timeout."),
}
# "Server Error", then 401, 403, 404, 500
_ABROAD: Mapping[str, Tuple[str, str, str, str, str]] = {
    "de": ("Serverfehler", "Nicht autorisiert: Zugriff aufgrund ungültiger Anmeldeinformationen verweigert.", "Verboten: Zugriff verweigert.", "Datei oder Verzeichnis wurde nicht gefunden.", "Interner Serverfehler."),
    "fr": ("Erreur de serveur", "Non autorisé : accès refusé en raison d'informations d'identification non valides.", "Interdit : accès refusé.", "Fichier ou répertoire introuvable.", "Erreur interne du serveur."),
    "zh": ("服务器错误", "未授权: 由于凭据无效，访问被拒绝。", "禁止访问: 访问被拒绝。", "找不到文件或目录。", "内部服务器错误。"),
    "ja": ("サーバー エラー", "認証されていません: 資格情報が無効なため、アクセスが拒否されました。", "許可されていません: アクセスが拒否されました。", "ファイルまたはディレクトリが見つかりません。", "内部サーバー エラーです。"),
    "ru": ("Ошибка сервера", "Нет прав доступа: недопустимые учётные данные.", "Запрещено: доступ запрещён.", "Файл или каталог не найден.", "Внутренняя ошибка сервера."),
    "tr": ("Sunucu Hatası", "Yetkisiz: Geçersiz kimlik bilgileri nedeniyle erişim reddedildi.", "Yasak: Erişim reddedildi.", "Dosya veya dizin bulunamadı.", "İç sunucu hatası."),
    "ar": ("خطأ في الخادم", "غير مخول: تم رفض الوصول بسبب بيانات اعتماد غير صالحة.", "ممنوع: تم رفض الوصول.", "لم يتم العثور على الملف أو الدليل.", "خطأ داخلي في الخادم."),
    "es": ("Error del servidor", "No autorizado: acceso denegado debido a credenciales no válidas.", "Prohibido: acceso denegado.", "No se encuentra el archivo o directorio.", "Error interno del servidor."),
}  # fmt: skip

LOGIN = (
    "<!DOCTYPE html>\r\n<html><head><title>Sign in</title></head>\r\n<body><form action=/login method=post>"
    "<input type=text name=user><input type=password name=password></form></body></html>\r\n"
)
CAPTIVE = (
    "<!DOCTYPE html>\n<html><head><title>Guest Network</title><meta http-equiv=refresh content=3600></head>\n"
    '<body id="portal"><h1>Welcome to the guest network</h1>\n<form action="https://portal.example/accept?id=4711" method="post">\n'
    '<input type="hidden" name="token" value="83"><input type="checkbox" name="terms"> I accept the terms within 10 minutes\n'
    '<input type="submit" value="Connect"></form></body></html>\n'
)
JSON = '{"error": {"code": 83, "message": "certnew.cer is not available", "retryable": false}}\n'
ASP = (
    '\r\n <font face="Arial" size=2>\r\n<p>Microsoft VBScript runtime </font> <font face="Arial" size=2>error \'800a01a8\'</font>\r\n'
    "<p>\r\n<font face=\"Arial\" size=2>Object required: 'ICertRequest'</font>\r\n<p>\r\n"
    '<font face="Arial" size=2>/certsrv/certfnsh.asp</font><font face="Arial" size=2>, line 176</font> '
)


def iis(status: Union[int, str], language: str = "en") -> str:
    """Return IIS's own small page for a status, with substatus perhaps, which shows only in its text."""
    name = str(status)
    whole = name.partition(".")[0]
    if whole == "503":
        return (
            '<!DOCTYPE HTML PUBLIC "-//W3C//DTD HTML 4.01//EN""http://www.w3.org/TR/html4/strict.dtd">\r\n'
            "<HTML><HEAD><TITLE>Service Unavailable</TITLE>\r\n"
            '<META HTTP-EQUIV="Content-Type" Content="text/html; charset=us-ascii"></HEAD>\r\n'
            "<BODY><h2>Service Unavailable</h2>\r\n<hr><p>HTTP Error 503. The service is unavailable.</p>\r\n</BODY></HTML>\r\n"
        )
    title, text = _IIS.get(name, ("Error", "Error."))
    server = "Server Error"
    places = {"401": 1, "403": 2, "404": 3, "500": 4}
    if language in _ABROAD and name in places:
        server = _ABROAD[language][0]
        title = text = _ABROAD[language][places[name]]
    shown = name if "." in name else whole
    return (
        '<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Strict//EN" "http://www.w3.org/TR/xhtml1/DTD/xhtml1-strict.dtd">\r\n'
        '<html xmlns="http://www.w3.org/1999/xhtml">\r\n<head>\r\n'
        f'<title>{shown} - {title}</title>\r\n</head>\r\n<body>\r\n<div id="header"><h1>{server}</h1></div>\r\n'
        f'<div id="content">\r\n <fieldset><h2>{shown} - {text}</h2></fieldset>\r\n</div>\r\n</body>\r\n</html>\r\n'
    )


def proxy(status: int) -> str:
    """Return an inspecting proxy's page: its own HTML, with numbers of its own in it."""
    what = "did not answer in time" if status == 504 else "sent an answer that could not be read"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>Network Error</title></head>\n<body>\n'
        f'<div id="notice"><h1>Network Error (gateway {status})</h1>\n<p>The server {what}.</p>\n'
        "<p>Transaction ID: 83-0x8f3a, policy 12. Contact your network support team.</p></div>\n</body>\n</html>\n"
    )
